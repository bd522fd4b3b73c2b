"""A character model of Python's own documentation, as a LightningModule."""

import os
import pydoc_data.topics

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS, WIDTH, LENGTH = int(os.environ.get("STEPS", "200")), 64, 32

lightning.seed_everything(0)
text = "".join(pydoc_data.topics.topics.values())[:100_000]
letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
ids = torch.tensor([letters[letter] for letter in text])
samples = TensorDataset(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))


class Model(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(letters), WIDTH)
        self.body = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(WIDTH, len(letters)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.body(self.embed(x))[0]
        return self.head(hidden)  # type: ignore[no-any-return]

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        return self.loss(batch[0])

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


train, validation = torch.utils.data.random_split(samples, [0.9, 0.1])
model = Model()
trainer = lightning.Trainer(
    max_steps=STEPS,
    val_check_interval=50,
    devices=int(os.environ.get("WORLD_SIZE", "1")),
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(model, DataLoader(train, batch_size=16, shuffle=True), DataLoader(validation, batch_size=64))
torch.save(model.state_dict(), "model.pt")
