"""A module that asks autograd for a gradient, as operators that ONNX has.

The exporter cannot trace autograd, so this does: what the backward pass calls becomes part of the
graph, its convolutions as the ordinary ones that they are.
"""

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
RELU = (aten.relu.default, aten.relu_.default)
ALIAS = (aten.alias.default, aten.detach.default)
TURNED = "_turned"  # ends the name of a weight as the backward pass has it


def unrolled(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """`module` with its backward passes spelled out; `example` (N, ...) with any N stands for all.

    Raises ValueError where a backward pass has no such form.
    """
    module = folded(module, example)
    graph_module = trace(module, example)
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in REWRITES:
            with graph_module.graph.inserting_before(node):
                REWRITES[node.target](node, graph_module)
    graph_module.graph.eliminate_dead_code()
    left = {str(n.target) for n in graph_module.graph.nodes if "_backward" in str(n.target)}
    if left:
        raise ValueError(
            f"the gradient of this network needs {', '.join(sorted(left))}, which ONNX lacks:"
            " leave out the detector consistency"
        )
    restore_names(graph_module, module)
    graph_module.graph.lint()  # type: ignore[no-untyped-call]
    graph_module.recompile()
    return graph_module


def folded(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `module` whose batch normalizations are part of the convolutions before them: in a
    backward pass no engine does that, and 8-bit layers would stop at each.
    """
    module = copy.deepcopy(module)
    for convolution, normalization in pairs(module, example):
        new = fuse_conv_bn_eval(convolution, normalization)
        convolution.weight, convolution.bias = new.weight, new.bias
        for parent in module.modules():
            for name, layer in parent.named_children():
                if layer is normalization:
                    setattr(parent, name, nn.Identity())
    return module


def pairs(module: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions, each with the batch normalization that alone takes what it gives, and no other:
    networks with pre-activations add it to something as well.
    """
    calls: list[tuple[nn.Conv2d, Tensor]] = []
    taken: list[tuple[nn.BatchNorm2d, Tensor]] = []
    reads = Reads()

    def after(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if type(layer) is nn.Conv2d:
            reads.count[id(output)] = 0  # it is kept, so that no other tensor gets its identity
            calls.append((layer, output))
        elif type(layer) is nn.BatchNorm2d:
            taken.append((layer, inputs[0]))

    hooks = [layer.register_forward_hook(after) for layer in module.modules()]
    with reads:
        module(example)
    for hook in hooks:
        hook.remove()
    made = {id(output): layer for layer, output in calls}
    takers = {id(value): layer for layer, value in taken}
    alone = [takers.get(id(y)) if reads.count[id(y)] == 1 else None for _, y in calls]
    found: set[tuple[nn.Conv2d | None, nn.BatchNorm2d | None]] = {
        *((layer, taker) for (layer, _), taker in zip(calls, alone, strict=True)),
        *((made.get(id(value)), layer) for layer, value in taken),
    }
    of = Counter(part for pair in found for part in pair)
    return [(a, b) for a, b in found if a and b and of[a] == of[b] == 1]


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """How often operators of a forward pass take a tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count, and call."""
        if "backward" not in str(func):
            self.count.update(id(value) for value in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def trace(module: nn.Module, example: Tensor) -> fx.GraphModule:
    """All operators that `module` calls on `example`, in both directions, for any batch."""
    try:
        traced, fixed = attempt(module, example)
    except RuntimeError:
        fixed = True
    if fixed:
        # What grows with the batch, as a transformer's class token or a detector's anchors, wants
        # Python's operators, and attention wants to be plain products and a softmax.
        with enable_python_dispatcher(), sdpa_kernel(SDPBackend.MATH):
            traced, _ = attempt(module, example, constants=True)
    return traced


def attempt(
    module: nn.Module, example: Tensor, *, constants: bool = False
) -> tuple[fx.GraphModule, bool]:
    """The operators, and whether they have become those of the example's batch alone; where asked,
    `constants` of the module may take the shape of the batch.
    """
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (example.dim() - 1)
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
    image = fake.from_tensor(example, symbolic_context=context)
    table: Any = core_aten_decompositions()
    tracer = make_fx(module, decomposition_table=table, _allow_non_fake_inputs=True)
    with fake if constants else contextlib.nullcontext():
        traced: fx.GraphModule = tracer(image)
    return traced, bool(fake.shape_env and fake.shape_env.replacements)


def shape(node: fx.Node) -> list[int]:
    """The shape of a traced value without its batch."""
    return [int(side) for side in node.meta["val"].shape[1:]]


def convolution(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """The gradient of a convolution with respect to its input: another convolution, turned over
    where the stride is 1, by phases where it divides the sides, else transposed.
    """
    arguments: Any = node.args
    slope, x, weight, _, stride, padding, dilation, _, _, groups, _ = arguments
    call = graph_module.graph.call_function
    kernel = list(graph_module.get_parameter(weight.target).shape[2:])
    # What the forward pass rounded away at the far border.
    sizes = zip(shape(x)[1:], stride, padding, dilation, kernel, strict=True)
    rest = [(side + 2 * p - d * (k - 1) - 1) % s for side, s, p, d, k in sizes]
    if list(stride) == [1, 1] and groups == 1:
        values = graph_module.get_parameter(weight.target).detach()
        turned = constant(graph_module, weight, values.transpose(0, 1).flip(2, 3))
        border = [d * (k - 1) - p for p, d, k in zip(padding, dilation, kernel, strict=True)]
        value = call(
            aten.convolution.default,
            (slope, turned, None, [1, 1], border, dilation, False, [0, 0], 1),
        )
    elif divides(node):
        value = phases(node, graph_module)
    else:
        value = call(
            aten.convolution.default,
            (slope, weight, None, stride, padding, dilation, True, rest, groups),
        )
    for user in list(node.users):  # of the gradients by input, weight and bias
        if user.args[1] == 0:
            user.replace_all_uses_with(value, propagate_meta=True)
        graph_module.graph.erase_node(user)
    graph_module.graph.erase_node(node)


def constant(graph_module: fx.GraphModule, weight: fx.Node, values: Tensor) -> fx.Node:
    """What is made of a weight, as a constant of its own: engines fold what is computed of
    weights, but not of 8-bit ones.
    """
    name = f"{weight.target}{TURNED}"
    graph_module.register_buffer(name, values.contiguous())
    return graph_module.graph.get_attr(name)


def divides(node: fx.Node) -> bool:
    """Whether a convolution's output is its input's size over its one stride, without dilation."""
    arguments: Any = node.args
    slope, x, _, _, stride, _, dilation, _, _, groups, _ = arguments
    smaller = [stride[0] * side for side in shape(slope)[1:]]
    return [*stride, *dilation, groups] == [stride[0]] * 2 + [1] * 3 and shape(x)[1:] == smaller


def phases(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node:
    """The gradient of a convolution of stride s, as one of stride 1 whose channels are the s * s
    phases of each pixel: engines are slow at transposed ones (Shi et al. 2016, section 3.2).
    """
    arguments: Any = node.args
    slope, _, weight, _, (s, _), padding, *_ = arguments
    values = graph_module.get_parameter(weight.target).detach()  # (O, I, KH, KW)
    outer, inner, *kernel = values.shape
    # Input pixel s * q + r meets output pixel q + d in the tap k = r + p - s * d.
    taps = [
        [(k - p - r) // -s for r in range(s) for k in range(side) if (k - p - r) % s == 0]
        for side, p in zip(kernel, padding, strict=True)
    ]
    (top, bottom), (left, right) = ((min(d), max(d)) for d in taps)
    made = values.new_zeros(inner, s, s, outer, bottom - top + 1, right - left + 1)
    for r_h, r_w in itertools.product(range(s), range(s)):
        for d_h, d_w in itertools.product(range(top, bottom + 1), range(left, right + 1)):
            k_h, k_w = r_h + padding[0] - s * d_h, r_w + padding[1] - s * d_w
            if 0 <= k_h < kernel[0] and 0 <= k_w < kernel[1]:
                made[:, r_h, r_w, :, d_h - top, d_w - left] = values[:, :, k_h, k_w].T
    turned = constant(graph_module, weight, made.flatten(0, 2))
    call = graph_module.graph.call_function
    border = [-left, right, -top, bottom]
    around = call(aten.constant_pad_nd.default, (slope, border)) if any(border) else slope
    value = call(
        aten.convolution.default, (around, turned, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    )
    return call(aten.pixel_shuffle.default, (value, s))


def pooling(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """The gradient of max-pooling: each maximum's slope goes where the maximum was."""
    arguments: Any = node.args
    slope, x, *_, indices = arguments
    call = graph_module.graph.call_function
    channels, height, width = shape(x)
    flat = [-1, channels, height * width]
    pooled = [-1, channels, shape(indices)[1] * shape(indices)[2]]
    zeros = call(aten.reshape.default, (call(aten.zeros_like.default, (x,)), flat))
    where, what = (call(aten.reshape.default, (value, pooled)) for value in (indices, slope))
    scattered = call(aten.scatter_add.default, (zeros, 2, where, what))
    node.replace_all_uses_with(
        call(aten.reshape.default, (scattered, [-1, channels, height, width]))
    )
    graph_module.graph.erase_node(node)


def view(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """A view, of values that may lie otherwise in memory than when they were traced."""
    node.target = aten.reshape.default


def mask(node: fx.Node, graph_module: fx.GraphModule) -> None:
    """The gradient of ReLU as a product: in 8 bits engines are slow at choosing from a constant."""
    arguments: Any = node.args
    condition, stopped, slope = arguments
    if not (isinstance(condition, fx.Node) and condition.target is aten.le.Scalar):
        return
    none = isinstance(stopped, fx.Node) and stopped.target is aten.scalar_tensor.default
    if not none or stopped.args[0] != 0:
        return
    value, bound = condition.args
    while isinstance(value, fx.Node) and value.target in ALIAS:
        value = value.args[0]
    if not (isinstance(value, fx.Node) and value.target in RELU and bound == 0):
        return
    call = graph_module.graph.call_function
    passed = call(aten.gt.Scalar, (value, 0))
    ones = call(aten._to_copy.default, (passed,), {"dtype": node.meta["val"].dtype})
    node.replace_all_uses_with(call(aten.mul.Tensor, (slope, ones)), propagate_meta=True)
    graph_module.graph.erase_node(node)


REWRITES: dict[Any, Callable[[fx.Node, fx.GraphModule], None]] = {
    aten.convolution_backward.default: convolution,
    aten.max_pool2d_with_indices_backward.default: pooling,
    aten.view.default: view,
    aten.where.self: mask,
}


def restore_names(graph_module: fx.GraphModule, module: nn.Module) -> None:
    """Give weights the names that `module` has for them, which `quantize` goes by."""
    named = [*module.named_parameters(), *module.named_buffers()]
    names = {id(tensor): name for name, tensor in named}
    found = [
        (node, getattr(graph_module, node.target))
        for node in graph_module.graph.nodes
        if node.op == "get_attr"
    ]
    ours = [(node, tensor, names[id(tensor)]) for node, tensor in found if id(tensor) in names]
    own = {node.target: name for node, _, name in ours}
    for node, tensor in found:
        if (source := node.target.removesuffix(TURNED)) != node.target:
            ours.append((node, tensor, own[source] + TURNED))
    # The deepest first: theirs above come with them.
    for home in sorted({name.rpartition(".")[0] for *_, name in ours}, reverse=True):
        if home not in dict(graph_module.named_modules()):
            graph_module.add_submodule(home, nn.Module())
    for node, tensor, name in ours:
        home, _, last = name.rpartition(".")
        owner = graph_module.get_submodule(home)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)
        node.target = name
