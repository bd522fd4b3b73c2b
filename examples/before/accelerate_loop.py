"""A transformer on the bytes of Python's own documentation, in a loop with accelerate."""

import os
import pydoc_data.topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

STEPS, WIDTH, LENGTH = int(os.environ.get("STEPS", "200")), 64, 64

accelerator = Accelerator(gradient_accumulation_steps=2)
set_seed(0)
text = bytearray("".join(pydoc_data.topics.topics.values()).encode()[:100_000])
ids = torch.frombuffer(text, dtype=torch.uint8).long()
samples = TensorDataset(ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.places = nn.Parameter(torch.zeros(LENGTH - 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device)
        hidden: torch.Tensor = self.body(self.embed(x) + self.places, mask, is_causal=True)
        return self.head(hidden)  # type: ignore[no-any-return]


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS * accelerator.num_processes)
loader = DataLoader(samples, batch_size=8, shuffle=True)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
step = 0
while step < STEPS:
    for (x,) in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if step == STEPS:
            break
if accelerator.is_main_process:
    torch.save(accelerator.unwrap_model(model).state_dict(), "model.pt")
