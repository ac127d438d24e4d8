"""Plain autograd on one example at a time, in float64, on copies of the user's model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuzz.losses import Loss
from fuzz.nets import logits_of
from fuzz.subjects import Subject, call, cast_model, loss_of, single

# of central differences
STEP = 1e-5


def doubled(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.double() if item.is_floating_point() else item
    if isinstance(item, Mapping):
        return {key: doubled(value) for key, value in item.items()}
    return tuple(map(doubled, item)) if isinstance(item, tuple) else item


def module_losses(loss: Any) -> Any:
    """The loss with its own tensors in float64."""
    return copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss


class Oracle:
    """The right answers about a subject, whose model was copied before it was asked about.

    Letters: n examples, P chosen parameters.
    """

    def __init__(self, subject: Subject, names: Sequence[str], evaluates: bool) -> None:
        self.subject, self.names, self.evaluates = subject, list(names), evaluates
        self.pristine = copy.deepcopy(subject.model)
        self._known: dict[Any, Tensor] = {}

    def forget(self) -> None:
        """Look at the user's model again."""
        self.pristine = copy.deepcopy(self.subject.model)
        self._known.clear()

    def model_at(self, checkpoint: int | None) -> nn.Module:
        """A copy at a checkpoint (None: as the user has it), in evaluation mode by its flags."""
        model = copy.deepcopy(self.pristine)
        if checkpoint is not None:
            model.load_state_dict(self.subject.states[checkpoint])
        cast_model(model, torch.float64)
        for module in model.modules():
            module.training = module.training and not self.evaluates
        self.parameters(model)
        return model

    def example(self, example: Any) -> Any:
        return doubled(single(self.subject, example))

    def loss(self, of_test: bool) -> Loss | None:
        own = self.subject.test_loss if of_test else None
        return module_losses(own or self.subject.loss)

    def gradients(self, checkpoint: int, of_test: bool) -> Tensor:
        """``[n, P]``."""
        key = (checkpoint, of_test)
        if key not in self._known:
            examples = self.subject.test if of_test else self.subject.train
            loss = self.loss(of_test)
            rows = [self._gradient(self.model_at(checkpoint), e, loss) for e in examples]
            self._known[key] = torch.stack(rows)
        return self._known[key]

    def _gradient(self, model: nn.Module, example: Any, loss: Loss | None) -> Tensor:
        with torch.enable_grad():
            total = loss_of(model, self.example(example), loss)
            return flat_gradient(total, self.parameters(model)).detach()

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The chosen ones; a frozen one of a named layer counts."""
        own = dict(model.named_parameters())
        return [own[name].requires_grad_() for name in self.names]

    def hooked(self, checkpoint: int | None, layer: str, of_test: bool, inputs: bool) -> Tensor:
        """What a layer gives (or sees) of each example run alone, flat: ``[n, d]``."""
        rows = []
        for example in self.subject.test if of_test else self.subject.train:
            seen: list[Tensor] = []
            model = self.model_at(checkpoint)

            def keep(_: nn.Module, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
                seen.append((args[0] if inputs else output).detach().clone().flatten())

            model.get_submodule(layer).register_forward_hook(keep)
            with torch.no_grad():
                call(model, self.example(example))
            rows.append(seen[-1])
        return torch.stack(rows)

    def check_validity(self) -> None:
        """Examples together must give the outputs of each alone: else there is no right answer."""
        with torch.no_grad():
            for examples in (self.subject.train, self.subject.test):
                model = self.model_at(0)
                batch = doubled(self.subject.collate(copy.deepcopy(examples)))
                together = logits_of(call(model, batch))
                for i, example in enumerate(examples):
                    alone = logits_of(call(self.model_at(0), self.example(example)))[0]
                    row = together[i, : len(alone)] if alone.dim() else together[i]
                    if not torch.allclose(row, alone, 1e-7, 1e-9):
                        raise AssertionError(f"example {i} together has {row}, alone {alone}")

    # Second derivatives.

    def hessian(self, checkpoint: int) -> Tensor:
        """Of the mean loss, ``[P, P]``."""
        loss, model = self.loss(False), self.model_at(checkpoint)
        parameters = self.parameters(model)
        total = torch.zeros(())
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for example in self.subject.train:
                total = total + loss_of(model, self.example(example), loss)
            first = flat_gradient(total, parameters, create_graph=True)
            rows = [flat_gradient(g, parameters, retain_graph=True) for g in first]
        found = torch.stack(rows).detach() / len(self.subject.train)
        if torch.allclose(found, found.T, 1e-6, 1e-9):
            return found
        # torch's own second derivative is wrong: of fused weight norm, say
        return self._differences(checkpoint)

    def _differences(self, checkpoint: int) -> Tensor:
        """The Hessian by central differences of gradients."""
        model = self.model_at(checkpoint)
        parameters, loss = self.parameters(model), self.loss(False)

        def slope() -> Tensor:
            losses = [loss_of(model, self.example(one), loss) for one in self.subject.train]
            return flat_gradient(sum(losses, torch.zeros(())), parameters)

        rows = []
        for parameter in parameters:
            entries = parameter.data.view(-1)
            for i in range(len(entries)):
                value = float(entries[i])
                ends = []
                for at in (value + STEP, value - STEP):
                    entries[i] = at
                    ends.append(slope())
                entries[i] = value
                rows.append((ends[0] - ends[1]) / (2 * STEP))
        found = torch.stack(rows) / len(self.subject.train)
        return (found + found.T) / 2

    def gauss_newton(self, checkpoint: int) -> Tensor:
        """Mean over examples of J^T H J, ``[P, P]``."""
        loss, model = self.loss(False), self.model_at(checkpoint)
        parameters = self.parameters(model)
        found = 0
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for example in self.subject.train:
                batch = self.example(example)
                z = logits_of(call(model, batch))
                j = [flat_gradient(one, parameters, retain_graph=True) for one in z.flatten()]
                h = _second(z.detach(), lambda out, b=batch: _given(loss, out, b))
                j = torch.stack(j)
                found = found + j.T @ h @ j
        return found.detach() / len(self.subject.train)

    def empirical_fisher(self, checkpoint: int) -> Tensor:
        g = self.gradients(checkpoint, False)
        return g.T @ g / len(g)


def _given(loss: Any, outputs: Tensor, batch: Any) -> Tensor:
    return loss(outputs, batch if isinstance(batch, Mapping) else batch[-1]).sum()


def _second(at: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.autograd.functional.hessian(function, at).reshape(at.numel(), at.numel())


def flat_gradient(total: Tensor, parameters: Sequence[Tensor], **how: Any) -> Tensor:
    """One vector; complex numbers as pairs, so that dot products are Re(conj(g) . g')."""
    if not total.requires_grad:
        return torch.cat([torch.zeros_like(_real(p)).flatten() for p in parameters])
    found = torch.autograd.grad(total, parameters, allow_unused=True, **how)
    pieces = []
    for g, p in zip(found, parameters, strict=True):
        own = torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
        pieces.append(_real(own).flatten())
    return torch.cat(pieces)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
