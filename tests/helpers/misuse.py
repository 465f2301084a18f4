"""The table of misuse: every public callable by every kind of wrong argument or order of calls.

`python -m tests.helpers.misuse` prints how many cells it has.
"""

import inspect
from collections import Counter

import featkd
from featkd import functional as f
from featkd import matching, report, testing
from tests.helpers.misuse_distiller import DISTILLERS
from tests.helpers.misuse_functions import FUNCTIONS
from tests.helpers.misuse_kinds import KINDS
from tests.helpers.misuse_modules import CALLS, CONSTRUCTORS
from tests.helpers.misuse_taps import TAPS
from tests.helpers.misuse_testing import TESTING

ROWS = [*FUNCTIONS, *CONSTRUCTORS, *CALLS, *TAPS, *DISTILLERS, *TESTING]
CELLS = [cell for row in ROWS for cell in row.cells()]


#: Public, but made by the library: `match_layers` and `Distiller.report` return them.
RESULTS = {"Layer", "LayerMatch", "LevelReport", "Report", "TermReport"}


def public() -> set[str]:
    """The callables of the public modules, and the methods that their classes add."""
    names = set()
    for module in (featkd, f, matching, report, testing):
        for name in module.__all__:
            value = getattr(module, name)
            if not callable(value) or isinstance(value, featkd.Hyperparameters):
                continue
            names |= {name} - RESULTS
            if inspect.isclass(value):
                ours = (base for base in value.__mro__ if base.__module__.startswith("featkd"))
                own = {k for base in ours for k, v in vars(base).items() if inspect.isfunction(v)}
                shown = {"extra_repr"}
                names |= {f"{name}.{k}" for k in own if k[0] != "_" and k not in shown}
    return names | {"FeatureTap.__enter__"}


def parameters_of(name: str) -> set[str]:
    """Those that a caller can give by name, besides a model's own."""
    owner, _, method = name.partition(".")
    value = next(getattr(m, owner) for m in (featkd, matching, testing) if hasattr(m, owner))
    function = getattr(value, method) if method else value
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind not in variable} - {"self"}


def markdown() -> str:
    """How many cells each callable has of each kind; `-`: the kind does not apply."""
    found = Counter((cell.callable, cell.kind) for cell in CELLS)
    lines = ["| callable | " + " | ".join(KINDS) + " | all |", "|---" * (len(KINDS) + 2) + "|"]
    for row in ROWS:
        counted = [found[row.name, kind] for kind in KINDS]
        shown = " | ".join(str(n) if n else "-" for n in counted)
        lines.append(f"| `{row.name}` | {shown} | {sum(counted)} |")
    totals = [sum(found[row.name, kind] for row in ROWS) for kind in KINDS]
    lines.append(f"| all {len(ROWS)} | " + " | ".join(map(str, totals)) + f" | {len(CELLS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
