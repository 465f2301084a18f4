"""The study: its runs are paired, resumed and never repeated; its tables are as by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study import runs as study
from benchmarks.study import tables as study_tables
from benchmarks.study import variants as study_variants

CPU = torch.device("cpu")
DATA = study.Data(held_out_seed=7, train_images=16, held_out_images=4)
PLAIN = study.plain_run("fcos", 3, DATA, steps=2)
DISTILLED = replace(
    PLAIN,
    teacher=study.Teacher(shape=(6, 1, 32), steps=2),
    method="featkd",
    hyperparameters=study.CANDIDATES["featkd"][1],
)


def line_of(run: study.Run, ap: float, teacher_ap: float | None = None) -> dict[str, Any]:
    metrics = dict.fromkeys(study.COLUMNS, ap) | {"ap_s": None}
    return {**json.loads(run.identity), **metrics, "teacher_ap": teacher_ap}


# --- what is run ----------------------------------------------------------------------------------


CHOOSING = {"tune", "taps", "presets", "open"}


def chosen_lines() -> list[dict[str, Any]]:
    """Weight 4 is the best on FCOS; the FPN's outputs on Faster R-CNN, the backbone's on FCOS."""
    lines = []
    for run in study.tune_runs([]):
        lines.append(line_of(run, 0.6 if run.hyperparameters.get("weight") == 4.0 else 0.1))
    for run in study.tap_runs(lines):
        fpn = run.hyperparameters.get("taps") == "fpn"
        lines.append(line_of(run, 0.6 if fpn == (run.detector == "faster_rcnn") else 0.1))
    return lines


@pytest.mark.parametrize("table", sorted(study.TABLES.keys() - {"quick"}))
def test_every_distilled_run_has_a_plain_student_beside_it(table: str) -> None:
    runs = study.TABLES[table](chosen_lines())
    assert len({run.identity for run in runs}) == len(runs)
    plain = {run.identity for run in runs if run.method == "none"}
    for run in runs:
        paired = replace(run, method="none", teacher=None, hyperparameters={})
        assert paired.identity in plain


def test_every_method_is_tuned_with_as_many_candidates() -> None:
    assert set(study.CANDIDATES) == set(study.LOSSES)
    assert {len(candidates) for candidates in study.CANDIDATES.values()} == {5}


def test_the_main_table_wants_the_tables_before_it_and_takes_the_best_of_them() -> None:
    lines = chosen_lines()
    with pytest.raises(LookupError, match="`run tune` finished first: 1 of its runs"):
        study.main_runs([*lines[:1], *lines[2:]])
    with pytest.raises(LookupError, match="`run taps` finished first: 1 of its runs"):
        study.main_runs(lines[:-1])
    runs = study.main_runs(lines)
    # The recommended preset is in Faster R-CNN's rows twice, at both taps.
    assert len(runs) == (11 + 10 + 10) * 5
    ours = [run.hyperparameters for run in runs if run.method == "featkd"]
    for everywhere in (study.FPN_OUTPUTS, *study.PRESETS_AT_STAGES):
        assert ours.count(everywhere) >= 3 * 5
    others = {run.method: run.hyperparameters for run in runs if run.detector == "faster_rcnn"}
    assert others["pkd"] == {"weight": 4.0, "taps": "fpn"}
    assert "taps" not in others["overhaul"]
    others = {run.method: run.hyperparameters for run in runs if run.detector == "retinanet"}
    assert others["pkd"] == {"weight": 4.0}


def test_at_the_fpn_a_baseline_that_gains_there_is_tried_with_three_weights() -> None:
    tried: dict[str, set[float]] = {}
    for run in study.tap_runs(chosen_lines()):
        if run.hyperparameters.get("taps") == "fpn":
            tried.setdefault(run.method, set()).add(run.hyperparameters.get("weight"))
    assert tried.pop("featkd") == {None}
    assert tried.pop("at") == {4.0}
    assert tried.pop("fgfi") == {0.0005, 0.002, 0.008}
    assert tried == {name: {1.0, 4.0, 16.0} for name in ("fitnets", "cwd", "pkd")}


def test_nothing_reported_is_on_seeds_or_scenes_that_chose_a_setting() -> None:
    lines = chosen_lines()
    runs = {name: study.TABLES[name](lines) for name in study.TABLES.keys() - {"quick"}}
    choosing = [run for name in CHOOSING for run in runs.pop(name)]
    reporting = [run for each in runs.values() for run in each]
    reported, chosen = ({run.seed for run in each} for each in (reporting, choosing))
    assert not reported & chosen
    assert study.Teacher().seed not in reported | chosen
    held_out = [{run.data.held_out_seed for run in each} for each in (reporting, choosing)]
    assert not held_out[0] & held_out[1]


def test_a_run_is_known_by_its_json_and_a_teacher_s_weights_by_its_training() -> None:
    assert study.identity(json.loads(json.dumps(line_of(DISTILLED, 0.5)))) == DISTILLED.identity
    assert replace(DISTILLED, seed=4).identity != DISTILLED.identity
    teacher = study.teacher_of(DISTILLED)
    elsewhere = replace(teacher, data=replace(DATA, held_out_seed=8))
    assert elsewhere.identity != teacher.identity
    assert elsewhere.name == teacher.name
    assert replace(teacher, steps=3).name != teacher.name


def test_a_line_leaves_out_defaults_alone() -> None:
    for settings in (*study.RELATIONS, *study.ATTENTION, *study.SENSITIVITY, *study.PRESETS):
        whole, variants = study_variants.split(settings)
        assert study.settings_of(whole) | variants == settings
    assert study.ATTENTION[0]["masked_attention"] == "spatial"
    assert "masked_attention" not in study.ATTENTION[2]


# --- a run ----------------------------------------------------------------------------------------


def test_the_same_seed_gives_every_method_the_same_student(tmp_path: Path) -> None:
    teacher = study.teacher_of(DISTILLED)
    weights = study.new_model(teacher, tmp_path, CPU).student.state_dict()
    torch.save(weights, tmp_path / f"{teacher.name}.pt")
    start = study.new_model(PLAIN, tmp_path, CPU).student.state_dict()
    for method, (hyperparameters, *_) in study.CANDIDATES.items():
        run = replace(DISTILLED, method=method, hyperparameters=hyperparameters)
        model = study.new_model(run, tmp_path, CPU)
        state = model.student.state_dict()
        assert list(state) == list(start)
        assert all(torch.equal(state[name], start[name]) for name in start)
    other = study.new_model(replace(PLAIN, seed=4), tmp_path, CPU).student.state_dict()
    assert not torch.equal(other["backbone.body.conv1.weight"], start["backbone.body.conv1.weight"])


# --- the variants ---------------------------------------------------------------------------------

CHANNELS = {"c3": 3}, {"c3": 5}
NORMALIZED = study.settings_of(study.featkd.NORMALIZED)


def features(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"c3": torch.randn(2, count, 4, 6, generator=generator)} for count in (3, 5)]


def masked(**settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return study_variants.featkd_loss(*CHANNELS, 10, **NORMALIZED | settings)


def test_without_a_variant_the_loss_is_the_library_s() -> None:
    torch.manual_seed(0)
    loss = study.featkd.FeatureDistillationLoss(*CHANNELS, hyperparameters=study.featkd.NORMALIZED)
    assert masked()(*features()) == loss(*features())


def test_live_masks_have_the_same_value_and_another_gradient() -> None:
    gradients = []
    for settings in ({}, {"masks": "live"}):
        student, teacher = features()
        student["c3"].requires_grad_()
        value = masked(**settings)(student, teacher)["attention_masked"]
        value.backward()
        gradients.append((value.item(), student["c3"].grad))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    assert not torch.allclose(gradients[0][1], gradients[1][1], rtol=0.01)


def test_a_temperature_in_units_of_the_spread_ignores_the_features_scale() -> None:
    student, teacher = features()
    larger = [{"c3": 100 * side["c3"]} for side in (student, teacher)]
    loss = masked(masks="spread", temperature=2.0)
    torch.testing.assert_close(loss(*larger), loss(student, teacher))
    maps = study.featkd.spatial_attention(student["c3"]), torch.ones(2, 5)
    assert torch.allclose(study_variants.standard(maps[0]).flatten(1).std(1), torch.ones(2))
    assert torch.equal(study_variants.standard(maps[1]), maps[1])


def test_masks_of_centred_attention_do_not_see_what_all_positions_have() -> None:
    student, teacher = (side["c3"] for side in features())
    offset = torch.rand(2, teacher.shape[1], 1, 1)
    shifted = student + 1, teacher + offset, teacher - offset
    centred = [x - x.mean((2, 3), keepdim=True) for x in (student, teacher, teacher)]
    loss, plain = (
        masked(**settings).attention_masked["c3"] for settings in ({"masks": "centred"}, {})
    )
    torch.testing.assert_close(loss.masks(*shifted, None), plain.masks(*centred, None))


def test_a_term_by_element_is_over_the_root_of_the_elements() -> None:
    by_element = masked(unit="element", normalize=False)
    whole = masked(normalize=False)
    by_element.levels["c3"].load_state_dict(
        {key.replace(".c3.", ".features."): value for key, value in whole.state_dict().items()}
    )
    found, printed = by_element(*features()), whole(*features())
    root = math.sqrt(5 * 4 * 6)
    torch.testing.assert_close(found, {name: value / root for name, value in printed.items()})


def test_a_schedule_warms_up_or_decays_and_survives_a_checkpoint() -> None:
    plain = masked()(*features())["attention_masked"].item()
    factors = {}
    for schedule in ("warm-up", "decay"):
        loss = masked(schedule=schedule)
        steps = []
        for _ in range(10):
            fresh = masked(schedule=schedule)
            fresh.load_state_dict(loss.state_dict())
            steps.append(loss(*features())["attention_masked"].item() / plain)
            again = fresh(*features())["attention_masked"].item() / plain
            assert again == pytest.approx(steps[-1])
        factors[schedule] = steps
    assert factors["warm-up"] == pytest.approx([0, 0.5] + [1] * 8)
    assert factors["decay"][0] == pytest.approx(1)
    assert factors["decay"][5] == pytest.approx(0.5)
    assert factors["decay"] == sorted(factors["decay"], reverse=True)


def test_a_tied_relation_is_the_teacher_s_on_the_adapted_student() -> None:
    loss = masked(beta=0.0, gamma=1.0, reduction="mean", relation="tied")
    (module,) = loss.non_local.values()
    adapter, relation = module.student_relation
    assert relation is module.teacher_relation
    student, teacher = features()
    ours, theirs = relation(adapter(student["c3"])), relation(teacher["c3"])
    expected = ((ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)).mean()
    assert loss(student, teacher)["non_local"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_fpn_s_outputs_can_be_tapped(tmp_path: Path) -> None:
    run = replace(DISTILLED, hyperparameters=NORMALIZED | {"taps": "fpn"})
    teacher = study.teacher_of(run)
    weights = study.new_model(teacher, tmp_path, CPU).student.state_dict()
    torch.save(weights, tmp_path / f"{teacher.name}.pt")
    model = study.new_model(run, tmp_path, CPU)
    assert model.loss.channels == dict.fromkeys(("p0", "p1", "p2"), (32, 32))
    settings = {"weight": 1.0, "taps": "fpn"}
    other = replace(run, method="fgfi", steps=1, hyperparameters=settings)
    assert study.perform(other, tmp_path, "cpu")["hyperparameters"] == settings


@pytest.mark.parametrize("backbone", study.BACKBONES)
def test_a_student_of_another_backbone_is_tapped_at_the_teacher_s_strides(
    tmp_path: Path, backbone: str
) -> None:
    run = replace(DISTILLED, student=backbone)
    teacher = study.teacher_of(run)
    weights = study.new_model(teacher, tmp_path, CPU).student.state_dict()
    torch.save(weights, tmp_path / f"{teacher.name}.pt")
    model = study.new_model(run, tmp_path, CPU)
    assert [theirs for _, theirs in model.loss.channels.values()] == [12, 24, 48]
    assert study_tables.facts(line_of(run, 0.5))["student"] == backbone


def test_a_line_of_mask_r_cnn_has_the_masks_metrics_and_becomes_a_row_of_them(
    tmp_path: Path,
) -> None:
    line = study.perform(replace(PLAIN, detector="mask_rcnn", steps=1), tmp_path, "cpu")
    assert {*study.MASK_COLUMNS} <= line.keys()
    line |= {"mask_ap": 0.25, "mask_ap50": 0.5, "mask_ap75": 0.125, "teacher_ap": None}
    (row,) = study_tables.rows([study.as_mask_line(line)])
    assert row.ap.mean == 25
    assert row.others == {"ap50": 50, "ap75": 12.5, "ap_s": None, "ap_m": None, "ap_l": None}


def test_a_killed_run_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from examples import training

    whole = study.perform(PLAIN, tmp_path, "cpu")
    (tmp_path / f"{PLAIN.name}.checkpoint.pt").unlink()
    (tmp_path / f"{PLAIN.name}.pt").unlink()

    def kill(*rest: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(study, "evaluate", kill)
        with pytest.raises(KeyboardInterrupt):
            study.perform(PLAIN, tmp_path, "cpu")
    # Both steps are done: nothing is trained again.
    monkeypatch.setattr(training, "backward", kill)
    resumed = study.perform(PLAIN, tmp_path, "cpu")
    assert [resumed[name] for name in study.COLUMNS] == [whole[name] for name in study.COLUMNS]
    assert study.identity(resumed) == PLAIN.identity
    assert (tmp_path / f"{PLAIN.name}.pt").exists()


@pytest.mark.slow
def test_a_table_is_run_once_and_its_lines_become_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    lines_file = tmp_path / "results" / "study.jsonl"
    broken = replace(DISTILLED, hyperparameters={"unknown": 1})
    table = [broken, PLAIN, DISTILLED]
    monkeypatch.setattr(study, "LINES", lines_file)
    monkeypatch.setattr(study, "TABLES", {"attention": lambda lines: table})
    command = ["run", "attention", "--workers", "1", "--output", str(tmp_path / "runs")]
    with pytest.raises(SystemExit, match="failed runs: 1"):
        study.main(command)
    assert f"{broken.name} failed" in capsys.readouterr().out
    table.remove(broken)
    written = lines_file.read_bytes()
    lines = {line["method"]: line for line in map(json.loads, written.splitlines())}
    assert list(lines) == ["teacher", "none", "featkd"]
    assert study.identity(lines["featkd"]) == DISTILLED.identity
    assert lines["featkd"]["teacher_ap"] == lines["teacher"]["ap"]
    assert lines["none"]["teacher_ap"] is lines["none"]["teacher"] is None
    assert lines["none"].keys() > {*study.COLUMNS, "seconds", "device", "versions"}
    left = {file.name for file in (tmp_path / "runs").glob("fcos-[!t]*")}
    assert left == {f"{PLAIN.name}.pt", f"{DISTILLED.name}.pt", f"{broken.name}.log"}

    with monkeypatch.context() as idle:
        idle.setattr(study, "worker_pool", None)
        study.main(command)
    assert lines_file.read_bytes() == written

    study.main(["tables"])
    report = lines_file.with_name("tables.md").read_text()
    assert report.count("| fcos |") == 2


# --- the lines ------------------------------------------------------------------------------------


def test_a_half_written_line_is_cut_off_and_its_run_is_pending(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    assert study.read_lines(file) == []
    study.append_line(file, line_of(PLAIN, 0.4))
    whole = file.read_bytes()
    study.append_line(file, line_of(DISTILLED, 0.5, 0.7))
    file.write_bytes(file.read_bytes()[:-40])
    lines = study.read_lines(file)
    assert lines == [line_of(PLAIN, 0.4)]
    assert file.read_bytes() == whole
    assert study.pending([PLAIN, DISTILLED, DISTILLED], lines) == [DISTILLED]
    study.append_line(file, line_of(DISTILLED, 0.5, 0.7))
    assert study.pending([PLAIN, DISTILLED], study.read_lines(file)) == []


def test_the_last_of_two_lines_of_a_run_counts(tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    for ap in (0.4, 0.6):
        study.append_line(file, line_of(PLAIN, ap))
    assert [line["ap"] for line in study.read_lines(file)] == [0.6]


def test_a_table_s_lines_are_in_the_order_of_its_runs() -> None:
    lines = [line_of(run, 0.5) for run in (DISTILLED, replace(PLAIN, seed=9), PLAIN)]
    found = study.lines_of([PLAIN, replace(PLAIN, seed=8), DISTILLED], lines)
    assert [line["method"] for line in found] == ["none", "featkd"]


def test_a_teacher_is_trained_where_its_line_or_its_weights_are_missing(tmp_path: Path) -> None:
    teacher = study.teacher_of(DISTILLED)
    runs, lines = [PLAIN, DISTILLED, replace(DISTILLED, seed=4)], [line_of(teacher, 0.7)]
    assert study.teachers_to_train(runs, lines, tmp_path) == [teacher]
    (tmp_path / f"{teacher.name}.pt").touch()
    assert study.teachers_to_train(runs, lines, tmp_path) == []
    assert study.teachers_to_train(runs, [], tmp_path) == [teacher]
    assert study.teachers_to_train([PLAIN], [], tmp_path) == []


# --- the tables -----------------------------------------------------------------------------------


def seeds(run: study.Run, *aps: float, teacher_ap: float | None = None) -> list[dict[str, Any]]:
    return [line_of(replace(run, seed=i), ap, teacher_ap) for i, ap in enumerate(aps)]


def test_an_interval_is_student_s() -> None:
    # mean 3, s = sqrt(2.5), t_{0.975, 4} = 2.776445
    found = study_tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert found.text("+") == "+3.00 ± 1.96"
    assert study_tables.interval([2.0]).text() == "2.00"


def test_a_gain_is_paired_by_seed() -> None:
    lines = seeds(PLAIN, 0.40, 0.60) + seeds(DISTILLED, 0.43, 0.62, 0.90, teacher_ap=0.8)
    plain, distilled = study_tables.rows(lines)
    assert plain.ap.mean == pytest.approx(50)
    assert plain.gain is None
    assert distilled.ap.mean == pytest.approx(65)
    # 3 and 2 points: mean 2.5, s = sqrt(1/2), t_{0.975, 1} = 12.706205
    assert distilled.gain.mean == pytest.approx(2.5)
    assert distilled.gain.half == pytest.approx(12.706205 / 2, rel=1e-6)
    assert distilled.gain.n == 2
    assert distilled.teacher_ap == pytest.approx(80)
    # 43, 62, 90: s = sqrt(559), t_{0.975, 2} = 4.302653
    report = study_tables.report(lines).splitlines()
    assert report[0].startswith("| detector | method | setting | AP | gain | n | AP50 |")
    assert "| fcos | featkd |  | 65.00 ± 58.73 | +2.50 ± 6.35 | 3 (2 paired) | 65.0 |" in report[3]
    assert "|  |" in report[2]


def test_a_gain_has_no_partner_of_other_data_steps_or_detector() -> None:
    other = [replace(PLAIN, steps=9), replace(PLAIN, data=replace(DATA, held_out_seed=9))]
    other.append(replace(PLAIN, detector="retinanet"))
    (distilled,) = [line_of(DISTILLED, 0.5)]
    assert study_tables.paired_gains([distilled], [line_of(run, 0.1) for run in other]) == []


def test_the_setting_says_what_differs_and_nothing_else() -> None:
    lines = []
    for settings in study.RELATIONS:
        lines += seeds(replace(DISTILLED, hyperparameters=settings), 0.5, teacher_ap=0.7)
    found = [row.setting for row in study_tables.rows(lines)]
    kinds = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
    assert found == [f"kind {kind}" for kind in kinds]
    wider = replace(DISTILLED, teacher=replace(DISTILLED.teacher, shape=(8, 1, 32)))
    longer = replace(DISTILLED, teacher=replace(DISTILLED.teacher, steps=3))
    lines = seeds(DISTILLED, 0.5) + seeds(wider, 0.5) + seeds(longer, 0.5)
    found = [row.setting for row in study_tables.rows(lines)]
    teachers = ("6-1-32 of 2 steps", "8-1-32 of 2 steps", "6-1-32 of 3 steps")
    assert found == [f"teacher {teacher}" for teacher in teachers]


def test_a_setting_at_its_default_is_left_out_where_something_else_is_said() -> None:
    lines = []
    for settings in study.PRESETS:
        lines += seeds(replace(DISTILLED, hyperparameters=settings), 0.5)
    found = {row.setting for row in study_tables.rows(lines)}
    assert {"NORMALIZED", "NORMALIZED, temperature 0.5", "ONE_STAGE"} <= found
    assert "NORMALIZED, beta 16, temperature 2, masks spread" in found
    assert len(found) == len(study.PRESETS)


def test_settings_are_compared_with_the_first_seed_by_seed() -> None:
    first, sharper = (
        replace(DISTILLED, hyperparameters=settings)
        for settings in (study.TWO_STAGE_AT_FPN, study.CHOICES[2])
    )
    lines = seeds(PLAIN, 0.1, 0.2) + seeds(first, 0.3, 0.5) + seeds(sharper, 0.2, 0.2)
    assert study_tables.against_first(lines).splitlines()[2:] == [
        f"| TWO_STAGE | {study_tables.interval([-10, -30]).text('+')} |"
    ]


def test_the_comparison_is_paired_by_seed_and_detector() -> None:
    rival = replace(DISTILLED, method="pkd", hyperparameters={"weight": 1.0})
    fcos = seeds(PLAIN, 0.3, 0.4) + seeds(rival, 0.5, 0.5) + seeds(DISTILLED, 0.6, 0.6)
    lines = fcos + [
        line | {"detector": "retinanet", "ap": line["ap"] + shift}
        for line in fcos
        for shift in [0.1 if line["method"] == "featkd" else 0.0]
    ]
    rivals = study_tables.contestants(lines, {})
    found = [row.split(" | ") for row in study_tables.comparison(*rivals).splitlines()]
    assert found[0] == ["| setting", "none", "pkd |"]
    # 30 and 20 points: mean 25, s = sqrt(50), t_{0.975, 1} = 12.706205
    assert found[2] == ["| featkd, : fcos", "+25.00 ± 63.53", "+10.00 ± 0.00 |"]
    assert found[3] == ["| featkd, : retinanet", "+35.00 ± 63.53", "+20.00 ± 0.00 |"]
    assert found[4] == ["| featkd, : mean", "+30.00 ± 63.53", "+15.00 ± 0.00 |"]
    gains = [row.split(" | ") for row in study_tables.gains_table(*rivals).splitlines()]
    assert gains[0] == ["| method", "fcos", "retinanet", "mean |"]
    assert gains[2] == ["| featkd, ", "+25.00 ± 63.53", "+35.00 ± 63.53", "+30.00 ± 63.53 |"]
    assert gains[3] == ["| pkd", "+15.00 ± 63.53", "+15.00 ± 63.53", "+15.00 ± 63.53 |"]
    # A seed that a detector lacks is in no mean over the detectors.
    without = [line for line in lines if (line["detector"], line["seed"]) != ("fcos", 1)]
    fewer = study_tables.comparison(*study_tables.contestants(without, {}))
    assert "| featkd, : mean | +35.00 | +15.00 |" in fewer


def test_the_contestants_are_what_all_detectors_have_and_what_was_chosen_for_each() -> None:
    elsewhere = replace(DISTILLED, detector="retinanet")
    alone = replace(elsewhere, hyperparameters=study.FPN_OUTPUTS)
    plain = seeds(PLAIN, 0.4) + seeds(replace(PLAIN, detector="retinanet"), 0.4)
    lines = plain + seeds(DISTILLED, 0.5) + seeds(elsewhere, 0.5) + seeds(alone, 0.6)
    chosen = {("fcos", "featkd"): DISTILLED.hyperparameters}
    chosen["retinanet", "featkd"] = study.FPN_OUTPUTS
    ours, others = study_tables.contestants(lines, chosen)
    assert [[line["ap"] for line in each] for each in ours.values()] == [[0.5, 0.6], [0.5, 0.5]]
    assert next(iter(ours)) == "featkd, tuned for each detector"
    assert others == {"none": plain}


def test_a_sweep_changes_one_hyperparameter_alone() -> None:
    lines = []
    for settings in study.SENSITIVITY:
        lines += seeds(replace(DISTILLED, hyperparameters=settings), 0.5)
    found = study_tables.sweeps(lines)
    values = {name: [value for value, _ in points] for name, points in found.items()}
    assert values == {
        "alpha": [1.75e-5, 7e-5, 28e-5],
        "beta": [1e-3, 4e-3, 16e-3],
        "gamma": [1.75e-5, 7e-5, 28e-5],
        "temperature": [0.5, 1.0, 2.0, 4.0, 16.0],
    }
    assert [cell[0]["hyperparameters"]["beta"] for _, cell in found["beta"]] == values["beta"]


def test_the_best_candidate_has_the_highest_mean_over_its_seeds() -> None:
    first, second, third = (
        replace(DISTILLED, hyperparameters=each) for each in study.CANDIDATES["featkd"][:3]
    )
    lines = seeds(PLAIN, 0.99, 0.99) + seeds(first, 0.1, 0.9)
    lines += seeds(second, 0.55, 0.56) + seeds(third, 0.5, 0.5)
    assert study_tables.best(lines) == {("fcos", "featkd"): second.hyperparameters}


def test_the_plots_are_drawn_even_of_single_seeds(tmp_path: Path) -> None:
    lines = seeds(PLAIN, 0.4) + seeds(DISTILLED, 0.5, teacher_ap=0.7)
    study_tables.gains_plot(*study_tables.contestants(lines, {}), tmp_path / "gains.png")
    study_tables.teachers_plot(lines, tmp_path / "teachers.png")
    swept = seeds(PLAIN, 0.4)
    for settings in study.SENSITIVITY:
        swept += seeds(replace(DISTILLED, hyperparameters=settings), 0.5)
    study_tables.sensitivity_plot(swept, tmp_path / "sensitivity.png")
    for name in ("gains.png", "teachers.png", "sensitivity.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
