"""The adversarial pruner: the trainer with a discriminator's verdict among its losses."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import nn

from ..nn.filters import FilterFn
from ..training import DistillPruner
from .adversarial_term import AdversarialTerm
from .config import GANConfig
from .game import Game
from .probe import null_test, probe

__all__ = ["GANPruner"]


class GANPruner(DistillPruner):
    """Prunes ``model`` while training it against ``teacher``: a :class:`DistillPruner` whose student is also to give
    features that a discriminator cannot tell from the teacher's.

    config: a :class:`GANConfig`; all other arguments and errors as for :class:`DistillPruner`. ``game`` holds the
    discriminator; :meth:`probe` and :meth:`null_test` say what a fresh one finds, as a pair accuracy in [0, 1].
    """

    config_type: ClassVar[type[GANConfig]] = GANConfig
    config: GANConfig

    def __init__(
        self, model: nn.Module, config: GANConfig | None = None, teacher: nn.Module | None = None,
        filter_fn: FilterFn | None = None, distributed: Literal["auto", "off"] = "auto", group: Any = None,
    ):  # fmt: skip
        super().__init__(model, config, teacher, filter_fn, distributed, group)
        self.adversary: AdversarialTerm = AdversarialTerm(self.config, self.device, self._note)

    @property
    def game(self) -> Game | None:
        """None before the first batch."""
        return self.adversary.game

    def null_test(self, loader: Any, steps: int = 200, cue: str | None = None, tokenizer: Any = None) -> float:
        """See :func:`sparseprune.gan.null_test`."""
        return null_test(self, loader, steps, cue, self.config.discriminator, tokenizer)

    def probe(self, loader: Any, steps: int = 200, tokenizer: Any = None) -> float:
        """See :func:`sparseprune.gan.probe`."""
        return probe(self, loader, steps, self.config.discriminator, tokenizer)
