"""The main job: a detector with and without distillation, `python -m examples.detection`."""
