"""The folder that the tests read."""

from pathlib import Path

import pytest

from benchmarks.study.tests.coco.folder import write_split


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    write_split(folder, "train2017", 0, 6)
    write_split(folder, "val2017", 1, 4)
    return folder
