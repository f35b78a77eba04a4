"""Contradictions between settings: one example for each rule."""

import pytest

from diffusion_jax import config as configs
from diffusion_jax.config import rules, values

SMALL, CALL = "data.low_resolution=16", "training.steps_per_call=7 training.checkpoint_every=7 training.sample_every=0"
CONSISTENCY = "diffusion.path=edm diffusion.prediction=x_0 diffusion.preconditioning=consistency"
FLOATS, CONTINUOUS = "data.levels=None", "data.levels=None data.random_flip=False"
EDM = "diffusion.path=edm diffusion.prediction=x_0 diffusion.preconditioning=edm"
EXAMPLES = {  # settings that differ from the defaults and break one rule, in the order of the rules
    "config": ["data.channel_names=u,v", "data.channel_units=m,s"],
    "data": [
        "data.holdout=0.1 data.split=dev",
        f"{FLOATS} data.normalization=limits",
        "data.normalization=none",
    ],
    "network": [
        f"model.architecture=ncsn++ {EDM}",
        "model.architecture=ncsn++ model.resample_blocks=True",
        "diffusion.conditioning_noise=0.1",
        f"{SMALL} diffusion.loss=classify",
        "data.low_resolution=5",
        f"{SMALL} model.condition_features=2",
        f"{SMALL} model.condition_channels=1",
        f"{SMALL} model.condition_dropout=0.1",
    ],
    "train step": [
        "diffusion.loss=continuous_vlb",
        "diffusion.draw=log_normal",
        "diffusion.timestep_sampler=log_normal",
        "diffusion.log_snr_shift=1",
        "diffusion.path=edm diffusion.loss=vlb",
        "diffusion.path=edm diffusion.variance=learned_range",
        "diffusion.path=edm diffusion.prediction=x_prev",
        "diffusion.path=edm diffusion.timestep_sampler=loss_second_moment",
        "diffusion.path=edm diffusion.rescale_timesteps=True",
        "diffusion.path=edm diffusion.draw=mine:draw diffusion.timestep_sampler=stratified",
        "diffusion.path=edm diffusion.draw=logit_normal diffusion.timestep_sampler=log_normal",
        "diffusion.path=rectified_flow diffusion.loss=continuous_vlb",
        "diffusion.path=rectified_flow diffusion.timestep_sampler=uniform_log_snr",
        "diffusion.draw_mean=0.5",
        "diffusion.draw_std=0.5",
        CONSISTENCY,
        "diffusion.loss=classify diffusion.preconditioning=edm",
        "diffusion.preconditioning=edm",
        "diffusion.sigma_data=0.3",
        f"{CONTINUOUS} {EDM} data.normalization=none",
        "diffusion.loss=vlb diffusion.weighting=p2",
        "diffusion.variance=learned",
        "diffusion.loss=hybrid",
        FLOATS,
        "optimizer.weight_decay=0.1",
        f"model.architecture=ncsn++ model.resample_blocks=True {EDM} optimizer.frozen=mid_*",
        "optimizer.schedule=cosine optimizer.decay_steps=5000",
    ],
    "training run": [
        f"{CALL} training.log_every=8",
        f"{CALL} training.log_every=7 training.sample_every=8",
        f"{CALL} training.log_every=7 training.checkpoint_every=8",
        f"{CALL} training.log_every=7 evaluation.every=8",
        f"{SMALL} evaluation.every=10",
    ],
    "samples": [
        "sampling.classifier=PATH sampling.classifier_form=mean sampling.sampler=ddim",
        "sampling.steps=5 sampling.spacing=given",
        "sampling.low_resolution=small.npz",
    ],
    "evaluation": [
        "evaluation.metrics=calibration",
        "evaluation.metrics=calibration model.num_classes=3 sampling.label=2",
        "evaluation.metrics=calibration model.condition_features=3 sampling.conditions=file.npy",
        CONSISTENCY,
        "evaluation.likelihood=False evaluation.num_samples=0",
        f"{CONTINUOUS} evaluation.ode=True evaluation.ode_dequantization=uniform",
    ],
    "edit": [
        "editing.example=3 editing.image=file.npy",
        "editing.task=deblur editing.noise=2 data.image_size=()",
        f"{CONTINUOUS} editing.task=colorize editing.noise=2",
        "editing.task=deblur",
        "editing.method=mmps",
        "editing.task=sdedit editing.noise=2",
        "editing.task=sdedit editing.method=project",
        "editing.operator=points.npy",
        "editing.share=0.5",
        "editing.task=deblur editing.noise=2 editing.operator=kernel.npy editing.blur=3",
        "editing.method=project editing.covariance=data",
        "editing.method=project editing.iterations=9",
        "editing.task=linear editing.noise=2 editing.operator=points.npy",
        "editing.task=sparse editing.noise=2 editing.operator=mine.py:kelvin",
    ],
    "without effect": [
        "sampling.eta=0.5",
        "sampling.churn=40",
        "sampling.churn_range=0.05,50",
        "sampling.churn_noise=1.1",
        "sampling.order=3",
        "sampling.spacing=karras",
        "model.architecture=ncsn++ model.embedding_cos_first=True",
        "model.architecture=ncsn++ model.embedding_freq_shift=0",
        "sampling.classifier_scale=4",
        "sampling.guidance_interval=10,200",
        "sampling.guidance_rescale=0.7",
    ],
}
PLACEHOLDERS = {"LOW,HIGH": "0,1", "VALUE": "1", "TIME,TIME,...": "1,5", "SCALE": "2", "PATH": "classifier", "N": "4"}


def changed(config, assignments):
    """The config with other values, unchecked."""
    pairs = [assignment.split("=") for assignment in assignments.split()]
    texts = {name: PLACEHOLDERS.get(text) or text.partition(" or ")[0] for name, text in pairs}
    found = configs.ConfigDict(config.to_dict())  # shares no values with config
    with found.ignore_type():
        found.update_from_flattened_dict({n: values.parse(configs.SETTINGS[n].kind, t) for n, t in texts.items()})
    return found


def broken(config, table):
    return [i for i, rule in enumerate(rules.RULES[table](config)) if rule.is_broken]


@pytest.mark.parametrize(
    ("table", "index", "example"), [(t, i, e) for t, examples in EXAMPLES.items() for i, e in enumerate(examples)]
)
def test_a_contradiction_is_one_line_with_remedies_that_work(table, index, example):
    config = changed(configs.default(), example)
    rule = rules.RULES[table](config)[index]
    assert broken(config, table) == [index]
    line = f"{rule.setting}={configs.flatten(config)[rule.setting]!r} {rule.problem}; use --config.{rule.setting}="
    with pytest.raises(configs.ConfigError) as caught:
        configs.check(config, table)
    assert str(caught.value).startswith(line) and "\n" not in line and len(str(caught.value)) < 400
    for remedy in (f"{rule.setting}={rule.use}".replace(" ", ""), rule.instead.partition(" or ")[0]):
        assert not remedy or index not in broken(changed(config, remedy), table), remedy


def test_every_rule_has_an_example_and_no_experiment_breaks_a_rule():
    assert {table: len(rules.RULES[table](configs.default())) for table in EXAMPLES} == {
        table: len(examples) for table, examples in EXAMPLES.items()
    }
    for config in map(configs.resolve, map(configs.experiment, configs.experiment_names())):
        assert not any(
            configs.find_broken(config, table)
            for table in ("data", "network", "train step", "training run", "samples", "evaluation", "edit")
        )


def test_a_url_of_an_operator_is_a_file():
    config = changed(configs.default(), "editing.task=sparse editing.noise=2 editing.operator=gs://bucket/points.npy")
    assert not configs.find_broken(config, "edit")


def test_contradictions_with_one_remedy_are_one_sentence():
    config = changed(configs.default(), "diffusion.path=edm diffusion.loss=hybrid diffusion.variance=learned_range")
    assert configs.find_broken(config, "train step") == [
        "diffusion.loss='hybrid', diffusion.variance='learned_range' needs the steps of a schedule, but "
        "diffusion.path='edm' is continuous; use --config.diffusion.loss=simple --config.diffusion.variance=fixed_large or "
        "--config.diffusion.path=None"
    ]
