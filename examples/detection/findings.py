"""What is wrong with a data set, all of it in one error."""

from pathlib import Path

from examples.detection.processes import JobError

SHOWN = 5


class DataError(JobError):
    """What is wrong with the data, in words for the person who started the job."""


class Findings:
    """What is wrong with the data of one annotation file, gathered by the rule that is broken."""

    def __init__(self, annotations: Path) -> None:
        self.annotations = annotations
        self.of_rule: dict[str, list[str]] = {}

    def add(self, where: str, rule: str, found: str | None = None) -> None:
        got = "" if found is None else f", got {found:.100}"
        self.of_rule.setdefault(rule, []).append(f"{where}: {rule}{got}")

    def say(self) -> None:
        """Nothing where there are none, else an error with the first few of each rule."""
        if not self.of_rule:
            return
        count = sum(map(len, self.of_rule.values()))
        lines = [f"{self.annotations}: {count} to mend, nothing has been trained"]
        for found in self.of_rule.values():
            lines += found[:SHOWN]
            if len(found) > SHOWN:
                lines.append(f"and {len(found) - SHOWN} more like this")
        raise DataError("\n  ".join(lines))
