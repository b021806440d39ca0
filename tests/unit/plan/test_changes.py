"""Changes of settings that fit the GPUs that are there, the cheapest first."""

from dataclasses import replace

import pytest

from pipelines.plan.capacity import cheapest_fit
from pipelines.plan.changes import for_the_same_gpus
from pipelines.plan.engine_choice import choose_engine
from pipelines.plan.published import published_models, published_plan
from pipelines.plan.run_plan import Plan


def published(address: str, *overrides: tuple[str, str, object]) -> Plan:
    plan = published_plan(next(one for one in published_models() if one.address == address))
    for group, name, value in overrides:
        settings = getattr(plan.config, group).model_copy(update={name: value})
        plan = replace(plan, config=plan.config.model_copy(update={group: settings}))
    return plan


FUSED = "train.fused_backward (train.max_grad_norm: null)"


class TestTheSameGpus:
    """Changes that fit the GPUs that are there, the cheapest first."""

    @pytest.mark.parametrize(
        ("gigabytes", "changes", "stage"),
        [
            (1, (), 0),  # 15.7 of weights, gradients and moments
            (9, ("train.optimizer: adamw8bit",), 0),  # 9.8 and the passes
            (15, ("train.optimizer: adafactor", FUSED), 0),  # no gradients kept
            (17.5, ("zero.offload_optimizer",), 1),  # 3.9 of weights
            (19, ("zero.offload_optimizer", "zero.offload_parameters", "train.text_encoders: none"), 3),
        ],
    )
    def test_one_gpu(
        self, monkeypatch: pytest.MonkeyPatch, gigabytes: float, changes: tuple[str, ...], stage: int
    ) -> None:
        """By the gigabytes that a step of Stable Diffusion's takes beside weights, gradients and moments."""

        def step_bytes(plan: Plan, keep_gradients: bool) -> int:
            return int(gigabytes * 1e9) + (4 * plan.trained_parameters if keep_gradients else 0)

        monkeypatch.setattr("pipelines.plan.memory._step_bytes", step_bytes)
        assert cheapest_fit(published("stable-diffusion-1.5"), 24) == (changes, stage)

    def test_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipelines.plan.memory._step_bytes", lambda *_: 24 * 2**30)
        assert cheapest_fit(published("stable-diffusion-1.5"), 24) is None

    @pytest.mark.parametrize(
        ("gigabytes", "changes", "stage"),
        [
            (10, (), 2),  # 11.8 of weights, gradients and moments
            (12.5, ("train.optimizer: adamw8bit",), 0),  # 9.8: each GPU has all of them
            (13.4, ("train.optimizer: adafactor",), 0),  # 9.7, by rows and columns of small kernels
            (16.5, ("zero.offload_optimizer",), 1),  # 3.9 of weights
        ],
    )
    def test_two_gpus(
        self, monkeypatch: pytest.MonkeyPatch, gigabytes: float, changes: tuple[str, ...], stage: int
    ) -> None:
        """Moments that are smaller on each fit where those that ZeRO divides don't, and wait for no host."""

        def step_bytes(plan: Plan, keep_gradients: bool) -> int:
            return int(gigabytes * 1e9) + (4 * plan.trained_parameters if keep_gradients else 0)

        monkeypatch.setattr("pipelines.plan.memory._step_bytes", step_bytes)
        plan = published("stable-diffusion-1.5", ("cluster", "num_workers", 2))
        assert cheapest_fit(plan, 24) == (changes, stage)

    def test_two_gpus_with_an_optimizer_chosen_already(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipelines.plan.memory._step_bytes", lambda *_: 2 * 2**30)
        chosen = ("train", "optimizer", "adafactor"), ("cluster", "num_workers", 2)
        assert cheapest_fit(published("stable-diffusion-1.5", *chosen), 24) == ((), 0)

    @pytest.mark.parametrize(("engine", "never"), [("torch", "offload"), ("deepspeed", "optimizer:")])
    def test_a_chosen_engine_stays(self, engine: str, never: str) -> None:
        plan = published("stable-diffusion-1.5", ("cluster", "num_workers", 2))
        plan = replace(plan, config=plan.config.model_copy(update={"engine": engine}))
        offered = [name for one in for_the_same_gpus(plan) for name in one.changes]
        assert offered
        assert not [name for name in offered if never in name]

    def test_several_gpus_go_by_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pipelines.plan.memory._step_bytes", lambda *_: 2 * 2**30)
        plan = published("stable-diffusion-xl", ("cluster", "num_workers", 2))
        assert cheapest_fit(plan, 80) == ((), 0)
        assert cheapest_fit(plan, 24) == (("zero.offload_optimizer",), 1)
        large = published("flux.1-dev", ("cluster", "num_workers", 4))
        assert cheapest_fit(large, 24) == (("zero.offload_optimizer",), 3)
        assert cheapest_fit(published("flux.1-dev"), 24) == (("zero.offload_optimizer", "zero.offload_parameters"), 3)

    @pytest.mark.parametrize(
        ("setting", "excluded"),
        [
            (("train", "method", "textual_inversion"), ("optimizer", "offload", "text_encoders")),
            (("train", "optimizer", "adafactor"), ("adamw8bit", "offload")),
            (("zero", "offload_optimizer", True), ("adamw8bit", "adafactor", "fused")),
            (("train", "gradient_accumulation_steps", 4), ("fused",)),
            (("cluster", "num_workers", 2), ("fused",)),
            (("train", "text_encoders", "none"), ("text_encoders",)),
        ],
    )
    def test_what_settings_exclude_is_not_offered(self, setting: tuple[str, str, object], excluded: tuple[str]) -> None:
        offered = [
            name for one in for_the_same_gpus(published("stable-diffusion-1.5", setting)) for name in one.changes
        ]
        assert not [name for name in offered for word in excluded if word in name]

    def test_every_offer_is_a_plan_that_can_be_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("dreambooth.training.optimizer.find_spec", lambda name: name)
        for workers in (1, 2):
            plan = published("stable-diffusion-1.5", ("cluster", "num_workers", workers))
            for changed, changes, stages in for_the_same_gpus(plan):
                for stage in stages:
                    config = changed.config.model_copy(
                        update={"zero": changed.config.zero.model_copy(update={"stage": stage})}
                    )
                    again = type(config).model_validate(config.model_dump())
                    engine = choose_engine(again)
                    of_torch = any(each.startswith("train.optimizer") for each in changes)
                    of_zero = any("offload" in each for each in changes)
                    assert engine == ("deepspeed" if of_zero or (workers > 1 and not of_torch) else "torch")
