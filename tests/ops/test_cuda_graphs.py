"""The ops in CUDA graphs: replays equal eager calls at every length, with every kind of border in between."""

import pytest
import torch

from million_ops import has_kernels
from tests.ops.layer_state import make_layer

ops = torch.ops.million_ops
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_kernels("cuda")), reason="needs a GPU and the compiled CUDA kernels"
)


@pytest.fixture(autouse=True)
def device():
    torch.set_default_device("cuda")
    yield "cuda"
    torch.set_default_device(None)


class Decoding:
    """One layer that takes a token a step: attention, append, and the clock's advance, eager or as a graph."""

    def __init__(self, layer, group: int):
        self.layer, self.new = layer, layer.new_tokens(1, group)
        self.args = layer.attention_args(*self.new), layer.append_args(*self.new[1:])
        self.out = self.graph = None

    def step(self):
        out, lse = ops.pq_attention_lse(*self.args[0])
        ops.pq_append_(*self.args[1][:-1], out)
        self.layer.clock[:2] += 1
        return out, lse

    def capture(self):
        before = self.layer.clone()
        self.step()
        torch.cuda.synchronize()
        self.restore(before)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.step()
        self.restore(before)

    def restore(self, layer):
        self.layer.clock.copy_(layer.clock)
        for name, x in layer.buffers.items():
            self.layer.buffers[name].copy_(x)

    def feed(self, tokens):
        for x, y in zip(self.new, tokens):
            x.copy_(y)


def run_both(decodings, group, steps, streams=1):
    """The graphs of ``decodings``, replayed step by step (on several streams at once), against eager clones."""
    eager = []
    for x in decodings:
        eager.append(Decoding(x.layer.clone(), group))
        x.capture()
    lanes = [torch.cuda.Stream() for _ in range(streams)]
    for _ in range(steps):
        tokens = [x.layer.new_tokens(1, group) for x in decodings]
        for x, y, new in zip(decodings, eager, tokens):
            x.feed(new), y.feed(new)
        torch.cuda.synchronize()
        for i, x in enumerate(decodings):
            with torch.cuda.stream(lanes[i % streams]):
                x.graph.replay()
        torch.cuda.synchronize()
        for x, y in zip(decodings, eager):
            out, lse = y.step()
            assert torch.equal(x.out[0], out) and torch.equal(x.out[1], lse)
            assert out.isfinite().all()
    for x, y in zip(decodings, eager):
        assert torch.equal(x.layer.clock, y.layer.clock)
        for name, buffer in x.layer.buffers.items():
            assert torch.equal(buffer.nan_to_num(7), y.layer.buffers[name].nan_to_num(7)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("past", "capacity"), [(0, 4096), (1000, 4096), (1980, 40_000)])
def test_across_borders(dtype, past, capacity):
    """Frames of 48, a ring of 16, tiles of 64, and splits that begin empty: 200 steps cross all of them. In the large cache more and
    more splits find something to do."""
    layer = make_layer(batch=2, heads=2, head_dim=128, past=past, capacity=capacity, recent=16, frame_tokens=48,
                       start=[0, 3], dtype=dtype)  # fmt: skip
    run_both([Decoding(layer, 4)], 4, 200)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_groups(group, head_dim):
    layer = make_layer(
        heads=2, head_dim=head_dim, past=500, capacity=1024, recent=16, frame_tokens=128, dtype=torch.bfloat16
    )
    run_both([Decoding(layer, group)], group, 40)


def test_several_caches_on_several_streams():
    layers = [
        make_layer(
            heads=2, head_dim=128, past=300 * (i + 1), capacity=2048, recent=16, frame_tokens=256, dtype=torch.float16
        )
        for i in range(3)
    ]
    run_both([Decoding(x, 4) for x in layers], 4, 60, streams=3)


@pytest.mark.parametrize(
    "batch, capacity, head_dim", [(1, 20_000, 128), (8, 2_000, 128), (1, 20_000, 256), (8, 2_000, 256)]
)
def test_attention_right_behind_an_append(batch, capacity, head_dim):
    """Layers of one model in turn, nothing between the append of one and the attention of the next: several steps in one graph."""
    layers = [
        make_layer(batch=batch, heads=8, head_dim=head_dim, past=capacity - 100, capacity=capacity, frame_tokens=256, dtype=torch.float16)
        for _ in range(3)
    ]  # fmt: skip
    tokens = [[layer.new_tokens(1, 4) for layer in layers] for _ in range(4)]

    def steps(layers, synchronise):
        outs = []
        for news in tokens:
            for layer, (q, k, v) in zip(layers, news):
                outs.append(ops.pq_attention(*layer.attention_args(q, k, v)))
                synchronise()
                ops.pq_append_(*layer.append_args(k, v, after=outs[-1]))
                synchronise()
            for layer in layers:
                layer.clock[:2] += 1
        return outs

    apart = [layer.clone() for layer in layers]
    want = steps(apart, torch.cuda.synchronize)
    first = [layer.clone() for layer in layers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = steps(layers, lambda: None)
    for _ in range(5):
        for layer, before in zip(layers, first):
            layer.clock.copy_(before.clock)
            for name, x in before.buffers.items():
                layer.buffers[name].copy_(x)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(outs, want))
        for layer, other in zip(layers, apart):
            for name, x in other.buffers.items():
                assert torch.equal(x.nan_to_num(7), layer.buffers[name].nan_to_num(7)), name


def test_full_buffers_drop_writes():
    layer = make_layer(heads=2, head_dim=128, past=120, capacity=128, recent=16, dtype=torch.float16)
    run_both([Decoding(layer, 4)], 4, 20)


@pytest.mark.parametrize(
    "batch, capacity", [(1, 200_000), (8, 40_000), (20, 20_000)]
)  # a launch to merge, clusters, waves
@pytest.mark.parametrize("recent", [0, 1, 64])
def test_append_beside_attention(batch, capacity, recent):
    """The append of one token runs while the attention before it still reads; what comes after both waits for both."""
    layer = make_layer(batch=batch, heads=8, head_dim=128, past=capacity - 8, capacity=capacity, recent=recent,
                       frame_tokens=2048, dtype=torch.float16)  # fmt: skip
    new = layer.new_tokens(1, 4)
    alone = ops.pq_attention(*layer.attention_args(*new))
    appended = layer.clone()
    ops.pq_append_(*appended.append_args(*new[1:]))
    torch.cuda.synchronize()
    before = layer.clone()

    def step():
        out = ops.pq_attention(*layer.attention_args(*new))
        ops.pq_append_(*layer.append_args(*new[1:], after=out))
        return out * 2  # reads what attention wrote, and depends on the append alone

    for _ in range(5):
        doubled = step()
        assert torch.equal(doubled, alone * 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = step()
    for _ in range(5):
        for name, x in before.buffers.items():
            layer.buffers[name].copy_(x)
        doubled.fill_(7)
        graph.replay()
        assert torch.equal(doubled, alone * 2)
        for name, x in appended.buffers.items():
            assert torch.equal(x.nan_to_num(7), layer.buffers[name].nan_to_num(7)), name
