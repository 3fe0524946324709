"""The distance from a teacher against a float64 reference written out by hand, and within the training loop."""

import math
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moeforge.errors import GateRefused
from moeforge.train import distill
from moeforge.train.distill import Teacher, divergence_sum

from .conftest import make_model
from .test_loop import bar, make, same, weights


def naive(logits, taught, labels, temperature):
    """T^2 times the sum of p log(p / q), token by token, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for mine, theirs, label in zip(logits.flatten(0, -2), taught.flatten(0, -2), labels.flatten(), strict=True):
        if label >= 0:
            p, q = ((values.double() / temperature).exp() for values in (theirs, mine))
            p, q = p / p.sum(), q / q.sum()
            total = total + (p * (p / q).log()).sum()
    return temperature**2 * total


def case(shape, dtype=torch.float64, seed=0):
    """logits, taught, labels: some tokens without a label, and there anything may stand."""
    generator = torch.Generator().manual_seed(seed)
    logits, taught = (torch.randn(*shape, generator=generator, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < 0.3] = -100
    labels.view(-1)[0], labels.view(-1)[-1] = 0, -100
    logits.view(-1, shape[-1])[-1], taught.view(-1, shape[-1])[-1] = math.nan, math.inf
    return logits.requires_grad_(), taught, labels


@pytest.mark.parametrize("piece", [1, 20, 1 << 23])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 61), (4, 2)])
def test_value_and_gradient_are_those_of_the_sum_over_labelled_tokens(monkeypatch, shape, temperature, piece):
    monkeypatch.setattr(distill, "PIECE", piece)
    logits, taught, labels = case(shape)
    expected = naive(logits, taught, labels, temperature)
    wanted = torch.autograd.grad(expected, logits)[0]
    found = divergence_sum(logits, taught.clone(), labels, temperature)
    gradient = torch.autograd.grad(0.3 * found, logits)[0]
    assert expected > 0.1
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    known = labels >= 0
    torch.testing.assert_close(gradient[known], 0.3 * wanted[known], rtol=1e-10, atol=1e-13)
    assert (gradient[~known] == 0).all()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_short_types_are_worked_on_in_float32(dtype, close):
    logits, taught, labels = case((3, 40, 211), dtype)
    exact = logits.detach().double().requires_grad_()
    expected = naive(exact, taught, labels, 2.0)
    wanted = torch.autograd.grad(0.9 / 37 * expected, exact)[0]
    found = divergence_sum(logits, taught.clone(), labels, 2.0)
    gradient = torch.autograd.grad(0.9 / 37 * found, logits)[0]
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    known = labels >= 0
    torch.testing.assert_close(gradient[known].double(), wanted[known], rtol=close, atol=1e-7)
    # rounding is to either side: what it does to the length of the gradient is far less than to a number
    assert float(gradient[known].double().norm()) == pytest.approx(float(wanted[known].norm()), rel=3e-4)


def test_a_teacher_of_another_precision_costs_the_student_none():
    logits, taught, labels = case((2, 9, 31), torch.float32)
    short = taught.bfloat16()
    exact = logits.detach().double().requires_grad_()
    wanted = torch.autograd.grad(naive(exact, short, labels, 1.0), exact)[0]
    gradient = torch.autograd.grad(divergence_sum(logits, short.clone(), labels), logits)[0]
    known = labels >= 0
    torch.testing.assert_close(gradient[known].double(), wanted[known], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_adds_nothing_and_what_is_missed_is_infinite():
    never = -math.inf
    taught = torch.tensor([[0.0, 1.0, never, never]])
    logits = torch.tensor([[0.5, 0.2, 0.3, never]], requires_grad=True)
    labels = torch.tensor([1])
    found = divergence_sum(logits, taught.clone(), labels)
    (gradient,) = torch.autograd.grad(found, logits)
    p, q = taught.double().softmax(-1)[0], logits.detach().double().softmax(-1)[0]
    assert float(found.detach()) == pytest.approx(float((p[:2] * (p[:2] / q[:2]).log()).sum()), rel=1e-6)
    torch.testing.assert_close(gradient[0].double(), q - p, rtol=1e-6, atol=1e-7)
    assert float(divergence_sum(torch.tensor([[0.5, never, 0.3, 0.1]]), taught.clone(), labels)) == math.inf
    assert math.isnan(float(divergence_sum(torch.tensor([[0.5, math.nan, 0.3, 0.1]]), taught.clone(), labels)))
    assert math.isnan(float(divergence_sum(logits.detach(), torch.full_like(taught, math.nan), labels)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_a_teacher_that_is_the_student_there_is_no_distance_and_no_pull(dtype):
    logits, _, labels = case((3, 11, 61), dtype)
    found = divergence_sum(logits, logits.detach().clone(), labels, 3.0)
    (gradient,) = torch.autograd.grad(found, logits)
    assert abs(float(found.detach())) <= 1e-6 and not gradient.any()


def test_no_second_table_of_tokens_by_vocabulary_is_made(monkeypatch):
    monkeypatch.setattr(distill, "PIECE", 1000)
    logits, taught, labels = case((4, 50, 101), torch.bfloat16)
    taught = taught.clone()
    largest, kept = [0], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            own = {value.untyped_storage().data_ptr() for value in (logits, taught)}
            for value in made if isinstance(made, tuple | list) else (made,):
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in own:
                    largest[0] = max(largest[0], value.numel())
            return made

    with (
        torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value),
        Watch(),
    ):
        divergence_sum(logits, taught, labels)
    assert 800 < largest[0] <= 1000
    assert [value.data_ptr() for value in kept] == [taught.data_ptr()]


def test_a_teacher_neither_learns_nor_drops_out():
    model = make_model("llama", attention_dropout=0.5).train()
    assert Teacher.of(model).model is model
    assert not model.training and not any(param.requires_grad for param in model.parameters())


def taught(tiny, directory, family="mixtral", teacher="llama", seed=9, **options):
    loop = make(tiny, directory, family, held=False, **options)
    loop.teacher = Teacher.of(tiny(teacher, seed=seed).to(next(loop.model.parameters()).dtype))
    return loop


@pytest.mark.parametrize("family", ["mixtral", "llama"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_step_is_the_gradient_of_the_mean_over_all_tokens(tiny, tmp_path, family, shared):
    """float64: accumulated, packed or padded rows against one document at a time, in both models."""
    settings = {"amount": 1, "balance": 0.0, "clip": 0.0, "kd": 0.7, "kd_temperature": 2.0}
    loop = taught(tiny, tmp_path, family, shared=shared, dtype=torch.float64, **settings)
    reference, teacher = tiny(family).double(), tiny("llama", seed=9).double()
    stream = loop.train.rows()
    loss, distance, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for row in (next(stream) for _ in range(4)):
        starts = [i for i in range(16) if row.positions[i] == 0] + [16]
        for a, b in pairwise(starts):
            if row.real[a]:
                tokens, labels = (torch.from_numpy(values[a:b]) for values in (row.tokens, row.labels))
                logits, told = (
                    model(input_ids=tokens[None], use_cache=False).logits[0] for model in (reference, teacher)
                )
                loss = loss + F.cross_entropy(logits, labels, reduction="sum")
                distance = distance + naive(logits, told.detach(), labels, 2.0)
                count += b - a
    assert shared is (count == 64)
    ((0.3 * loss + 0.7 * distance) / count).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in reference.parameters() if p.grad is not None))
    record = loop.run(bar).metrics.of("step")[0]
    assert list(record)[:7] == ["event", "step", "tokens", "lr", "norm", "loss", "kd"]
    assert record["loss"] == pytest.approx(float(loss.detach()) / count, rel=1e-6)
    assert record["kd"] == pytest.approx(float(distance.detach()) / count, rel=1e-6)
    assert record["norm"] == pytest.approx(norm, rel=1e-6)


def test_two_passes_of_a_row_are_one_of_two(tiny, tmp_path):
    settings = {"amount": 3, "balance": 0.0, "kd": 0.5, "shared": False}
    one = taught(tiny, tmp_path / "one", rows=1, accumulate=2, **settings)
    two = taught(tiny, tmp_path / "two", rows=2, accumulate=1, **settings)
    first, second = (loop.run(bar).metrics.of("step") for loop in (one, two))
    for a, b in zip(first, second, strict=True):
        assert a["tokens"] == b["tokens"] < 32
        assert (a["kd"], a["loss"], a["norm"]) == pytest.approx((b["kd"], b["loss"], b["norm"]), rel=5e-6)
    wanted = weights(two)
    for name, value in weights(one).items():
        assert float((value - wanted[name]).norm()) <= 5e-6 * float(wanted[name].norm())


def test_what_the_teacher_s_routers_say_is_left_out_of_the_student_s_losses(tiny, tmp_path):
    """Of the same names, so that nothing but the model tells them apart."""
    settings = {"amount": 1, "balance": 0.5, "z": 0.1, "routing_every": 1}
    alone = make(tiny, tmp_path / "alone", held=False, **settings).run(bar).metrics.of("step")[0]
    loop = taught(tiny, tmp_path / "taught", teacher="mixtral", kd=0.5, **settings)
    found = loop.run(bar).metrics.of("step")[0]
    assert {name: found[name] for name in ("loss", "balance", "z", "routing")} == {
        name: alone[name] for name in ("loss", "balance", "z", "routing")
    }
    assert found["kd"] > 0.1 and found["norm"] != alone["norm"]


def test_the_teacher_stays_and_the_student_comes_nearer(tiny, tmp_path):
    loop = taught(tiny, tmp_path, amount=25, kd=1.0, learning_rate=1e-2)
    before = {name: value.clone() for name, value in loop.teacher.model.state_dict().items()}
    steps = loop.run(bar).metrics.of("step")
    assert steps[-1]["kd"] < 0.5 * steps[0]["kd"]
    assert same(before, loop.teacher.model.state_dict())


def test_the_teacher_s_logits_are_gone_before_the_loss_has_gone_back(tiny, tmp_path, monkeypatch):
    loop = taught(tiny, tmp_path, amount=1, kd=0.5)
    whole, made, alive = Teacher.logits, [], []

    def logits(self, batch):
        found = whole(self, batch)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Teacher, "logits", logits)
    # the first that is reached behind the head
    loop.model.model.norm.weight.register_hook(lambda gradient: alive.append(made[-1]() is not None))
    loop.run(bar)
    assert alive == [False, False]


def test_a_teacher_of_no_numbers_is_named(tiny, tmp_path):
    loop = taught(tiny, tmp_path, kd=0.5)
    with torch.no_grad():
        loop.teacher.model.lm_head.weight[5, 3] = math.nan
    with pytest.raises(GateRefused, match="the distance from the teacher became nan at step 1"):
        loop.run(bar)
