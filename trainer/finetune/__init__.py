"""The bundled program, `python -m trainer.finetune`: its settings, data and model."""
