"""What the path of a tap names, and what it says where that is not there any more."""

import gc
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from featkd import FeatureTap
from featkd.taps.paths import require_in_place, resolve
from tests.helpers.models import LEVELS, Net, hook_count, images, plain_hooks, raises
from tests.helpers.tapped import HasModule, LowRank, captured, captures_what_plain_hooks_see
from tests.helpers.tensors import close

# --- paths ----------------------------------------------------------------------------------------


def test_an_unknown_path_is_an_error_with_close_matches():
    raises(ValueError, lambda: FeatureTap(Net(), ["backbone.c3"]), "'backbone.c1'", "'backbone.c2'")
    raises(ValueError, lambda: FeatureTap(AveragedModel(Net()), ["backbone.c"]), "'backbone.c1'")


def test_an_unknown_path_that_is_like_none_is_an_error_without_a_hint():
    said = "must be the path of a module of the Net, got 'zzz'."
    raises(ValueError, lambda: FeatureTap(Net(), ["zzz"]), said)


def test_an_unknown_path_that_ends_others_is_an_error_with_the_first_three():
    model = nn.ModuleDict({name: nn.ModuleDict({"conv": nn.ReLU()}) for name in "abcd"})
    close_to = "(close: 'a.conv', 'b.conv', 'c.conv')."
    raises(ValueError, lambda: FeatureTap(model, ["conv"]), "got 'conv'", close_to)


def test_an_error_leaves_no_hook_behind():
    model = Net()
    raises(ValueError, lambda: FeatureTap(model, ["backbone.c1", "backbone.c3"]))
    gc.collect()
    assert hook_count(model) == 0


class Wrapper(nn.Module):
    """Stands for DDP, torch.compile, FSDP or a checkpoint wrapper, as named in a path."""

    def __init__(self, model, name):
        super().__init__()
        self.name = name
        self.add_module(name, model)

    def forward(self, *args):
        return getattr(self, self.name)(*args)


WRAPPERS = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapper_prefixes_can_be_left_out_or_written(name):
    model = Net()
    model.backbone.c1 = Wrapper(model.backbone.c1, name)
    wrapped = Wrapper(Wrapper(model, name), "module")
    expected = plain_hooks(model.backbone.c1, [name], lambda: model(images()))[name]
    for path in ("backbone.c1.relu", f"module.{name}.backbone.c1.{name}.relu"):
        close(captured(FeatureTap(wrapped, [path]), lambda: wrapped(images()))[path], expected, 0.0)


def test_a_path_written_with_prefixes_finds_the_bare_model():
    model = Net()
    path = "module._orig_mod.backbone.c1"
    expected = plain_hooks(model, ["backbone.c1"], lambda: model(images()))["backbone.c1"]
    close(captured(FeatureTap(model, [path]), lambda: model(images()))[path], expected, 0.0)


@pytest.mark.parametrize("wrap", [lambda model: model, AveragedModel], ids=["bare", "averaged"])
@pytest.mark.parametrize("path", ["module", "module.c1", "neck"])
def test_an_attribute_called_module_is_the_users(wrap, path):
    wrapped = wrap(HasModule())
    model = wrapped.module if isinstance(wrapped, AveragedModel) else wrapped
    expected = plain_hooks(model, [path], lambda: model(images()))[path]
    close(captured(FeatureTap(wrapped, [path]), lambda: wrapped(images()))[path], expected, 0.0)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("path", ["head", "{}.head"])
def test_an_attribute_called_like_a_wrapper_hides_no_path(name, path):
    model = nn.ModuleDict({"head": nn.Conv2d(3, 2, 1), name: nn.ModuleDict({"head": nn.ReLU()})})
    model.forward = lambda x: model[name]["head"](model["head"](x))
    wrapped, path = Wrapper(model.double(), "module"), path.format(name)
    expected = plain_hooks(model, [path], lambda: model(images()))[path]
    close(captured(FeatureTap(wrapped, [path]), lambda: wrapped(images()))[path], expected, 0.0)


@pytest.mark.parametrize("wrap", [lambda model: model, AveragedModel], ids=["bare", "averaged"])
def test_tied_modules_are_reached_by_both_names(wrap):
    model = Net()
    model.tied = model.backbone
    model = wrap(model)
    tap = FeatureTap(model, {"first": "backbone.c1", "second": "tied.c1"})
    first, second = captured(tap, lambda: model(images())).values()
    close(first, second, 0.0)


def test_a_path_written_with_prefixes_may_name_what_is_wrapped_of_a_tied_module():
    conv = nn.Conv2d(3, 4, 3).double()
    model = nn.Sequential(*[Wrapper(conv, "module")] * 2)
    assert resolve(model, "1.module", "layers")[0] is conv


# --- modules that are no longer what was tapped ---------------------------------------------------


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def add_lora(model):
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(target_modules=["conv"], init_lora_weights=False))


def to_sync_batch_norm(model):
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def fuse(model):
    torch.ao.quantization.fuse_modules(model.eval().backbone.c1, [["conv", "norm"]], inplace=True)


def assign(model):
    model.backbone.c1.conv = nn.Conv2d(3, 4, 3, 2, 1).double()


def assign_around(model):
    model.backbone.c1 = Around(model.backbone.c1)


def assign_another_backbone(model):
    model.backbone = Net().backbone


def delete(model):
    del model.backbone.c1[2]


REPLACED = {
    "LoRA": (add_lora, "backbone.c1.conv", "peft's Conv2d in place of torch's Conv2d"),
    "LoRA, an input": (add_lora, "backbone.c1.conv:input", "peft's Conv2d"),
    "SyncBatchNorm": (to_sync_batch_norm, "backbone.c1.norm", "torch's SyncBatchNorm in place of"),
    "fused": (fuse, "backbone.c1.norm", "torch's Identity in place of torch's BatchNorm2d"),
    "another": (assign, "backbone.c1.conv", "torch's Conv2d in place of torch's Conv2d"),
    "one around it": (assign_around, "backbone.c1", "tests's Around"),
    "another model around it": (assign_another_backbone, "backbone.c1", "torch's Sequential"),
    "none": (delete, "backbone.c1.relu", "nothing in place of torch's ReLU"),
}
REASONS = (
    "it was replaced or wrapped, as by LoRA, a conversion or a quantisation. Make the tap (or the "
    "distiller) after that."
)
each_replaced = pytest.mark.parametrize(
    ("replace", "path", "mention"),
    [
        pytest.param(*case, id=kind, marks=[pytest.mark.model_zoo] if "LoRA" in kind else [])
        for kind, case in REPLACED.items()
    ],
)


@each_replaced
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_module_that_was_replaced_is_an_error_that_says_so(replace, path, mention):
    model = Net()
    with FeatureTap(model, {"c": path}) as tap:
        model.eval()(images())
        tap.pop()
        replace(model)
        model.eval()(images())
        raises(RuntimeError, tap.pop, "layers['c']", mention, repr(path), REASONS)


@each_replaced
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_a_tap_made_after_that_captures_what_plain_hooks_see(replace, path, mention):
    model = Net()
    replace(model)
    model.eval()
    if replace is delete:
        raises(ValueError, lambda: FeatureTap(model, [path]), "'backbone.c2.relu'")
    elif ":" not in path:
        captures_what_plain_hooks_see(FeatureTap(model, [path]), model, lambda: model(images()))


@pytest.mark.model_zoo
def test_the_old_path_in_a_peft_model_is_an_error_with_the_new_one():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(), LoraConfig(target_modules=["conv"], init_lora_weights=False))
    new = "base_model.model.backbone.c1.conv"
    raises(ValueError, lambda: FeatureTap(model, ["backbone.c1.conv"]), f"(close: {new!r})")
    tap = FeatureTap(model, [new])
    features = captures_what_plain_hooks_see(tap, model, lambda: model(images()))
    assert features[new].requires_grad


def wrapped_by(name):
    def wrap(model):
        model.backbone.c1 = Wrapper(model.backbone.c1, name)

    return wrap


def put_around_the_backbone(model):
    model.backbone = nn.Sequential(model.backbone)


def parametrize(model):
    conv = model.backbone.c1.conv
    nn.utils.parametrize.register_parametrization(conv, "weight", LowRank(conv.weight))


@pytest.mark.parametrize(
    "change", [*map(wrapped_by, WRAPPERS), put_around_the_backbone, parametrize]
)
def test_a_module_that_still_runs_as_itself_was_not_replaced(change):
    model = Net()
    expected = []
    model.backbone.c1.register_forward_hook(lambda *call: expected.append(call[-1].clone()))
    tap = FeatureTap(model, LEVELS)
    change(model)
    close(captured(tap, lambda: model(images()))["c1"], expected[0], 0.0)


@pytest.mark.parametrize(
    ("wrap", "path", "tapped"),
    [
        (None, "", ""),
        (None, "backbone.c1:input[0]", "backbone.c1"),
        ("around", "", "module"),
        ("around", "backbone.c1", "module.backbone.c1"),
        ("inside", "backbone.c1.relu", "backbone.c1.module.relu"),
        ("inside", "backbone.c1", "backbone.c1.module"),
    ],
)
def test_a_module_in_its_place_is_found_without_the_names_of_all(wrap, path, tapped, monkeypatch):
    """At each pop; they take a thousand times longer."""
    model = Net()
    if wrap == "inside":
        model.backbone.c1 = Wrapper(model.backbone.c1, "module")
    model = Wrapper(model, "module") if wrap == "around" else model
    module = model.get_submodule(tapped)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    require_in_place(model, path, "layers", module)


# --- models that were traced, exported or scripted ------------------------------------------------


def traced(model):
    return torch.jit.trace(model, images())


def exported(model):
    return torch.export.export(model, (images(),)).module()


def quantised(model):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    settings = get_default_qat_qconfig_mapping("fbgemm")
    return prepare_qat_fx(model.train().float(), settings, (images().float(),))


def with_observers(model):
    """As pt2e's `prepare_qat_pt2e` leaves an exported model: of its modules observers alone run."""
    program = exported(model)
    graph = program.graph
    convolutions = [node for node in graph.nodes if "conv" in str(node.target)]
    convolutions = [node for node in convolutions if node.op == "call_function"]
    for index, node in enumerate(convolutions):
        program.add_submodule(f"observer_{index}", nn.Hardtanh(-100, 100))
        with graph.inserting_after(node):
            observed = graph.call_module(f"observer_{index}", (node,))
        node.replace_all_uses_with(observed, lambda user, observed=observed: user is not observed)
    program.recompile()
    return program


def scripted(_):
    """Of no convolution: torch takes its list of paddings for a function that had the same id."""
    return torch.jit.script(nn.Sequential(nn.Tanh()))


GRAPHS = {
    "symbolic_trace": (torch.fx.symbolic_trace, "backbone.c1", "such as 'backbone.c1.relu'."),
    "export": (exported, "backbone.c1.conv", "tap the model that this was made of."),
    "qat": (quantised, "backbone.c1", "such as 'backbone.c1.conv'."),
    "pt2e": (with_observers, "backbone.c1.conv", "tap the model that this was made of."),
    "jit.trace": (traced, "backbone.c1.conv", "TopLevelTracedModule"),
    "jit.script": (scripted, "0", "RecursiveScriptModule"),
    "a scripted model itself": (scripted, "", "RecursiveScriptModule"),
}
quiet = pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:.*torch.jit.* is deprecated",
    "ignore:.*reduce_range:UserWarning",
)


@quiet
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside another"])
@pytest.mark.parametrize(("make", "path", "mention"), GRAPHS.values(), ids=GRAPHS)
def test_a_name_that_never_runs_is_an_error_at_once(make, path, mention, inside):
    model = make(Net().eval())
    if inside:
        model, path = Around(model), f"inner.{path}".rstrip(".")
        mention = mention.replace("'backbone", "'inner.backbone")
    raises(ValueError, lambda: FeatureTap(model, {"c": path}), "layers['c']", repr(path), mention)


@quiet
@pytest.mark.parametrize("path", ["", "backbone.c1.relu", "head"])
def test_what_a_traced_model_does_call_is_captured(path):
    model = torch.fx.symbolic_trace(Net())
    captures_what_plain_hooks_see(FeatureTap(model, [path]), model, lambda: model(images()))


@quiet
@pytest.mark.parametrize("make", [traced, exported])
def test_what_a_traced_or_exported_model_puts_out_is_captured(make):
    model = make(Net().eval())
    captures_what_plain_hooks_see(FeatureTap(model, [""]), model, lambda: model(images()))


@pytest.mark.parametrize("path", ["", "observer_0", "observer_1"])
def test_what_a_pt2e_model_does_call_is_captured(path):
    model = with_observers(Net().eval())
    assert {"observer_0", "observer_1"} <= {name for name, _ in model.named_modules()}
    captures_what_plain_hooks_see(FeatureTap(model, [path]), model, lambda: model(images()))


def test_the_parts_of_an_unflattened_program_run():
    model = torch.export.unflatten(torch.export.export(Net().eval(), (images(),)))
    tap = FeatureTap(model, list(LEVELS.values()))
    captures_what_plain_hooks_see(tap, model, lambda: model(images()))


def test_a_tied_module_that_runs_beside_the_graph_is_captured():
    model = Net()
    model.graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    model.graph.unused = model.backbone.c1
    tap = FeatureTap(model, ["graph.unused"])
    captures_what_plain_hooks_see(tap, model, lambda: model(images()))


def test_a_tied_module_whose_first_name_is_a_graphs_is_captured():
    part = nn.Conv2d(3, 4, 3).double()
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    graph.unused = part
    model = nn.Sequential(graph, part)
    captures_what_plain_hooks_see(FeatureTap(model, ["1"]), model, lambda: model(images()))


def called(module, x):
    return module(x)


def test_a_module_that_a_graph_fetches_and_hands_on_is_captured():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(called, (graph.get_attr("part"), x)))
    model = torch.fx.GraphModule({"part": nn.Conv2d(3, 4, 3).double()}, graph)
    captures_what_plain_hooks_see(FeatureTap(model, ["part"]), model, lambda: model(images()))


def test_a_traced_copy_that_runs_in_place_of_the_model_is_named():
    model = Net()
    copied = torch.fx.symbolic_trace(model)
    with FeatureTap(model, LEVELS) as tap:
        copied(images())
        raises(RuntimeError, tap.pop, "got 0", "no traced or exported copy")


def test_an_argument_for_another_alias_is_told_those_there_are():
    text = "`calls` must name aliases of ['c1', 'c2'], got 'c9'."
    raises(ValueError, lambda: FeatureTap(Net(), LEVELS, calls={"c9": 2}), text)


def test_hooks_that_somebody_took_off_are_named():
    model = Net()
    with FeatureTap(model, LEVELS) as tap:
        model.backbone.c1._forward_hooks.clear()
        model(images())
        raises(RuntimeError, tap.pop, "got 0: its hooks were taken off the model, make a new tap.")


# --- selectors ------------------------------------------------------------------------------------


class Output(nn.Module):
    """Puts out whatever `make` makes of its features."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x, x.relu())


def model_output(first, second):
    from transformers.utils import ModelOutput

    return ModelOutput(first=first, second=second)


class NamedPair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Pair:
    def __init__(self, first, second):
        self.first, self.second = first, second


STRUCTURES = {
    "dict": (lambda a, b: {"first": a, "second": b}, "[second]", "'second'"),
    "integer keys": (lambda a, b: {3: a, 4: b}, "[4]", "4"),
    "tuple": (lambda a, b: (a, b), "[1]", "tuple of 2"),
    "from the end": (lambda a, b: [a, b], "[-1]", "list of 2"),
    "the first from the end": (lambda a, b: [b, a], "[-2]", "list of 2"),
    "nested": (lambda a, b: {"maps": (a, [b])}, "[maps][1][0]", "'maps'"),
    "named tuple": (NamedPair, "[second]", "NamedPair of 2"),
    "attribute": (Pair, "[second]", "Pair"),
    "model output": (model_output, "[second]", "'second'"),
}


@pytest.mark.parametrize(
    ("make", "selector", "mention"),
    [
        pytest.param(*case, id=kind, marks=[pytest.mark.model_zoo] if "model" in kind else [])
        for kind, case in STRUCTURES.items()
    ],
)
def test_a_structure_needs_a_selector_and_gives_what_it_selects(make, selector, mention):
    model = nn.Sequential(Output(make))
    with FeatureTap(model, ["0"]) as tap:
        raises(ValueError, lambda: model(images()), mention, "'0'", "0[KEY]")
    tap = FeatureTap(model, {"second": f"0{selector}"})
    close(captured(tap, lambda: model(images()))["second"], images().relu(), 0.0)


@pytest.mark.parametrize(
    ("kind", "selector", "mention"),
    [
        ("dict", "[third]", "['first', 'second']"),
        pytest.param("model output", "[third]", "['first', 'second']", marks=pytest.mark.model_zoo),
        ("tuple", "[2]", "tuple of 2"),
        ("tuple", "[-3]", "tuple of 2"),
        ("tuple", "[first]", "tuple of 2"),
        ("attribute", "[third]", "Pair"),
        ("nested", "[maps][1][1]", "list of 1"),
    ],
)
def test_a_selector_of_nothing_is_an_error_with_what_is_there(kind, selector, mention):
    model = nn.Sequential(Output(STRUCTURES[kind][0]))
    with FeatureTap(model, {"c": f"0{selector}"}):
        raises(ValueError, lambda: model(images()), "layers['c']", mention)


class TwoInputs(nn.Module):
    def forward(self, first, second=None):
        return first if second is None else first + second


class CallsTwoInputs(nn.Module):
    def __init__(self, by_name):
        super().__init__()
        self.inner = TwoInputs()
        self.by_name = by_name

    def forward(self, x):
        return self.inner(x, second=x + 1) if self.by_name else self.inner(x, x + 1)


@pytest.mark.parametrize(
    ("path", "by_name", "shift"),
    [("[0]", False, 0), ("[1]", False, 1), ("[0]", True, 0), ("[second]", True, 1)],
)
def test_inputs_are_taken_by_position_and_name(path, by_name, shift):
    model = CallsTwoInputs(by_name)
    tap = FeatureTap(model, {"x": f"inner:input{path}"})
    close(captured(tap, lambda: model(images()))["x"], images() + shift, 0.0)


def test_one_input_needs_no_selector_and_two_do():
    model = Net()
    tap = FeatureTap(model, {"x": "backbone:input"})
    close(captured(tap, lambda: model(images()))["x"], images(), 0.0)
    model = CallsTwoInputs(by_name=True)
    with FeatureTap(model, ["inner:input"]):
        raises(ValueError, lambda: model(images()), "'0'", "'second'")
