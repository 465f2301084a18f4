"""The study at full size, on COCO: `python -m benchmarks.study.coco`."""
