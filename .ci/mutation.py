"""Runs mutmut's mutants of the working directory; see `.ci/mutation`.

The mutants, mypy's verdict on them and the functions that a test reaches are mutmut's; settings
under [tool.mutmut] in pyproject.toml. Each mutant then meets the tests that reach it, until one
fails, in a fork of one collected pytest session: mutmut's own runner collects anew each time.
Prints the score by file, then the survivors.
"""

import gc
import json
import math
import os
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import redirect_stdout
from operator import itemgetter
from pathlib import Path
from typing import TextIO

import libcst as cst
import pytest
from mutmut import __main__ as mutmut
from mutmut.configuration import config
from mutmut.mutation import file_mutation
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.file_utils import change_cwd

SECONDS = 20  # of tests for each mutant, the cheapest first
MEMORY = 4 << 30  # beyond what the session has: sizes go wrong too
SURVIVED, NO_TESTS, REFUSED = 0, 33, 37  # mutmut's numbers

DECORATED = {"contextmanager", "torch.no_grad()"}  # mutmut passes over all that is decorated


def mutate_decorated() -> None:
    """Lets mutmut break the functions of these decorators, with its switch around all of them."""
    skips = file_mutation.MutationVisitor._skip_node_and_children
    arrange = file_mutation.function_trampoline_arrangement

    def decorators(function: cst.FunctionDef) -> set[str]:
        return {cst.Module([]).code_for_node(each.decorator) for each in function.decorators}

    def skips_but_these(self: object, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and decorators(node) & DECORATED:
            return False
        return skips(self, node)

    def arrange_outermost(function: cst.FunctionDef, *args: object, **names: object) -> tuple:
        declared, (switch, *functions), *rest = arrange(function, *args, **names)
        if decorators(function) & DECORATED:
            switch = switch.with_changes(decorators=switch.decorators[::-1])
        return declared, [switch, *functions], *rest

    file_mutation.MutationVisitor._skip_node_and_children = skips_but_these
    file_mutation.function_trampoline_arrangement = arrange_outermost


def generate() -> list[SourceFileMutationData]:
    """Write the mutants, and note those that mypy refuses: they are no valid programs."""
    Path("mutants").mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    with redirect_stdout(sys.stderr):
        mutmut.create_mutants(1)
    files = [SourceFileMutationData(path=path) for path in sorted(mutmut.walk_mutatable_files())]
    for file in files:
        file.meta_path = file.meta_path.absolute()
        file.load()
    if any(code is None for file in files for code in file.exit_code_by_key.values()):
        refused = mutmut.filter_mutants_with_type_checker()
        for file in files:
            file.exit_code_by_key |= {m: REFUSED for m in file.exit_code_by_key if m in refused}
            file.save()
    return files


class Mutants:
    """The pytest plugin that runs the collected tests once for the map, then for each mutant."""

    def __init__(self, files: list[SourceFileMutationData]) -> None:
        self.files = files
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def pytest_internalerror(self, excrepr: object) -> None:
        print(excrepr, file=sys.stderr)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise RuntimeError("a file of tests could not be collected")
        self.items = {item.nodeid: item for item in session.items}
        gc.collect()
        gc.freeze()  # a fork copies what it touches
        clean = sorted(self.map_of_tests(), key=itemgetter(1))
        for file in self.files:
            killers = defaultdict(list)
            for mutant, code in file.exit_code_by_key.items():
                if code not in (None, SURVIVED, NO_TESTS):
                    continue
                function = mutant.partition("__mutmut_")[0]
                cheapest = [test for test, _, found in clean if function in found]
                tests = dict.fromkeys([*killers[function], *cheapest])
                code, done = self.run(mutant, tests, SECONDS) if tests else (NO_TESTS, [])
                killer = done[-1][0] if code == 1 else ""
                if killer:
                    killers[function].insert(0, killer)
                file.exit_code_by_key[mutant] = code
                file.save()
                print(time.strftime("%X"), mutant, code, killer, file=sys.stderr, flush=True)
        return True

    def map_of_tests(self) -> list:
        """Of each test its id, its seconds and the functions that it reaches."""
        code, clean = self.run("stats", self.items, math.inf)
        if code != 0:
            raise RuntimeError(f"without a mutant: exit code {code} at {clean[-1][0]}")
        return clean

    def run(self, mutant: str, tests: Iterable[str], seconds: float) -> tuple[int, list]:
        """The exit code of a fork that runs `tests` to the first failure, and what each one did."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            self.in_fork(mutant, tests, seconds, os.fdopen(write, "w"))
        os.close(write)
        with os.fdopen(read) as lines:
            done = [json.loads(line) for line in lines]
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), done

    def in_fork(self, mutant: str, tests: Iterable[str], limit: float, results: TextIO) -> None:
        code = 3  # whatever else ends it
        try:
            set_mutant_under_test(mutant)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            room = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (room, room))
            for test in tests:
                state()._stats.clear()
                signal.setitimer(signal.ITIMER_PROF, 60)  # of CPU time: an endless loop
                start = time.perf_counter()
                item = self.items[test]
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                seconds = time.perf_counter() - start
                print(json.dumps([test, seconds, sorted(state()._stats)]), file=results, flush=True)
                if self.failed or time.process_time() > limit:
                    break
            code = int(self.failed)
        finally:
            os._exit(code)


def table(files: list[SourceFileMutationData]) -> str:
    rows = [
        ("/".join(file.path.parts[1:]), Counter(file.exit_code_by_key.values()))
        for file in files
        if file.exit_code_by_key
    ]
    rows.append(("all", sum((codes for _, codes in rows), Counter())))
    lines = ["| file | mutants | valid | killed | left | score |", "|---|--:|--:|--:|--:|--:|"]
    for name, codes in rows:
        valid = codes.total() - codes[REFUSED]
        left = codes[SURVIVED] + codes[NO_TESTS]
        score = 100 * (valid - left) / max(valid, 1)
        counts = f"{codes.total()} | {valid} | {valid - left} | {left}"
        lines.append(f"| `{name}` | {counts} | {score:.1f} % |")
    return "\n".join(lines)


def main() -> None:
    mutate_decorated()
    files = generate()
    with change_cwd("mutants"), Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        options = config().pytest_add_cli_args + config().pytest_add_cli_args_test_selection
        code = pytest.main(["--tb=no", "--rootdir=.", *options], plugins=[Mutants(files)])
    if code:
        sys.exit(int(code))
    print(table(files))
    for file in files:
        for mutant, code in file.exit_code_by_key.items():
            if code in (SURVIVED, NO_TESTS):
                print(f"\n{mutant}\n{get_diff_for_mutant(mutant, path=file.path)}")


if __name__ == "__main__":
    main()
