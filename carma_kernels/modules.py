"""The losses as modules: the same options, kept with the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from carma_kernels._terms import HiddenStates
from carma_kernels.config import CarmaConfig, checked
from carma_kernels.functional import CarmaOutput, carma_loss, mi_loss, stability_loss
from carma_kernels.pairs import PairIndex
from carma_kernels.spans import TokenSpans

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MILoss(nn.Module):
    """`mi_loss` with its options; a `temperature` that is an `nn.Parameter` is trained with the model."""

    temperature: float | Tensor

    def __init__(
        self,
        *,
        negatives: str = "sequence",
        temperature: float | Tensor = 0.1,
        metric: str = "cosine",
        layers: tuple[int, int] | None = None,
        match_negatives: float | None = None,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        """Take the options of `mi_loss`."""
        super().__init__()
        self.negatives = negatives
        _keep_temperature(self, temperature)
        self.metric = metric
        self.layers = layers
        self.match_negatives = match_negatives
        self.reduction = reduction
        self.group = group
        self.backend = backend

    def forward(
        self,
        hidden_states: HiddenStates,
        spans_or_pairs: TokenSpans | PairIndex,
        num_pairs: float | Tensor | None = None,
    ) -> Tensor:
        """The MI loss of `[L, B, T, D]` or L times `[B, T, D]`: see `mi_loss`."""
        return mi_loss(
            hidden_states,
            spans_or_pairs,
            negatives=self.negatives,
            temperature=self.temperature,
            metric=self.metric,
            layers=self.layers,
            match_negatives=self.match_negatives,
            reduction=self.reduction,
            num_pairs=num_pairs,
            group=self.group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options that say what is computed."""
        return f"negatives={self.negatives!r}, temperature={_short(self.temperature)}, metric={self.metric!r}"


class StabilityLoss(nn.Module):
    """`stability_loss` with its options."""

    def __init__(
        self,
        *,
        layers: tuple[int, int] | None = None,
        eps: float = 1e-8,
        reduction: str = "sum",
        group: ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        """Take the options of `stability_loss`."""
        super().__init__()
        self.layers = layers
        self.eps = eps
        self.reduction = reduction
        self.group = group
        self.backend = backend

    def forward(self, hidden_states: HiddenStates, mask: Tensor | None = None) -> Tensor:
        """The stability loss of `[L, B, T, D]` or L times `[B, T, D]`: see `stability_loss`."""
        return stability_loss(
            hidden_states,
            layers=self.layers,
            mask=mask,
            eps=self.eps,
            reduction=self.reduction,
            group=self.group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options that say what is computed."""
        return f"layers={self.layers}, eps={self.eps}, reduction={self.reduction!r}"


class CarmaLoss(nn.Module):
    """`carma_loss` with its config; a `config.temperature` that is an `nn.Parameter` is trained with the model."""

    temperature: float | Tensor

    def __init__(
        self, config: CarmaConfig | None = None, *, group: ProcessGroup | None = None, backend: str | None = None
    ) -> None:
        """Take a config, or the paper's, and the other options of `carma_loss`."""
        super().__init__()
        config = checked(CarmaConfig() if config is None else config)
        # held once, as the module's: loading a state or moving the module may put another tensor in its place
        _keep_temperature(self, config.temperature)
        self._config = replace(config, temperature=CarmaConfig.temperature)
        self.group = group
        self.backend = backend

    @property
    def config(self) -> CarmaConfig:
        """The options, with the temperature as the module holds it now."""
        return replace(self._config, temperature=self.temperature)

    def forward(
        self,
        hidden_states: HiddenStates,
        spans_or_pairs: TokenSpans | PairIndex,
        mask: Tensor | Literal["all"] | None = None,
        num_pairs: float | Tensor | None = None,
    ) -> CarmaOutput:
        """Both losses of `[L, B, T, D]` or L times `[B, T, D]`: see `carma_loss`."""
        return carma_loss(
            hidden_states,
            spans_or_pairs,
            self.config,
            mask=mask,
            num_pairs=num_pairs,
            group=self.group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The config."""
        fields_and_values = (f"{name}={_short(value)}" for name, value in vars(self.config).items())
        return ", ".join(fields_and_values)


def _keep_temperature(module: MILoss | CarmaLoss, temperature: float | Tensor) -> None:
    """A tensor moves with the module and is saved with it; a parameter is trained besides."""
    if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
        module.register_buffer("temperature", temperature)
    else:
        module.temperature = temperature


def _short(value: object) -> str:
    return f"{type(value).__name__} on {value.device}" if isinstance(value, Tensor) else repr(value)
