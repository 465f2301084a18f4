"""The main job: a detector with and without distillation, `python -m examples.detection`."""

from importlib.util import find_spec

MISSING = [
    name for name in ("torchvision", "torchmetrics", "matplotlib", "tqdm") if not find_spec(name)
]
if MISSING:
    text = ", ".join(MISSING)
    raise ModuleNotFoundError(f'examples.detection wants {text}: pip install -e ".[examples]"')
