"""The table of all leaves, by group, and the questions about a config that several modules ask.

A leaf with identity decides the numbers of a run, so that a relaunch must not change it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import likelihood, losses, process, schedules, timesteps
from diffusion_jax.config.presets import CLASSIFIER_PRESETS
from diffusion_jax.config.values import (
    Boolean,
    Choice,
    Integer,
    Interval,
    Nothing,
    Number,
    OneOf,
    Text,
    Tuple,
    ValueKind,
    optional,
)

__all__ = [
    "CLASSIFIER_LEAVES",
    "GROUPS",
    "LEAVES",
    "Leaf",
    "clips_by_default",
    "flatten",
    "identity_leaves",
    "is_classifier",
    "is_continuous",
    "is_upsampler",
    "reference",
    "resolve_clip",
]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a config.

    default: the value of DDPM's run on CIFAR-10.
    kind: the allowed values.
    description: a text for the reference; errors show its first sentence.
    identity: whether the leaf decides the numbers of a run, so that a relaunch must not change it.
    """

    default: Any
    kind: ValueKind
    description: str
    identity: bool = False


_IdentityLeaf = functools.partial(Leaf, identity=True)
SEED = Integer(0, 2**32 - 1)

ROOT: dict[str, Leaf] = {
    "seed": _IdentityLeaf(0, SEED, "Seed of the initial parameters, the batches and the noise of training."),
    "init_from": Leaf(
        "", Text(), 'Path of weights that training starts from, as `pretrained.load` takes it; "" for none.'
    ),
    "init_flags": Leaf(
        "",
        Text(),
        "Settings that the weights of `init_from` do not contain: the name of a preset, OpenAI's flags, or JSON.",
    ),
}

DATA: dict[str, Leaf] = {
    "dataset": _IdentityLeaf(
        "cifar10",
        Text(),
        'Name of a TFDS data set, "folder" (images below `data.data_dir`), "arrays" (.npy, .npz, .zarr or .h5 at '
        '`data.data_dir`), "digits" (scikit-learn\'s), or module:function (`config.data` to a `data.Source`).',
    ),
    "data_dir": Leaf(
        "", Text(), 'Directory of TFDS ("" for ~/tensorflow_datasets), folder of images, or file of arrays.'
    ),
    "download": Leaf(
        True,
        Boolean(),
        "Whether a missing TFDS data set is downloaded and prepared. Use False if nodes have no network.",
    ),
    "split": _IdentityLeaf("train", Text(), "Split of the data set that is trained on."),
    "holdout": _IdentityLeaf(
        0.0,
        Number(minimum=0, below=1),
        "Share of the examples of a folder or file that is never trained on; it is the split test, and the others are train. "
        "A hash decides for each example alone: of its path below a folder of images, or of its values in arrays.",
    ),
    "image_size": _IdentityLeaf(
        32,
        OneOf(Integer(1), Tuple(Integer(1), "0 to 3 whole numbers", maximum_length=3, shown="(32, 48)")),
        "Size of an example: one number for square images, or the size of each spatial axis, (height, width) for images, "
        "(length,) for series, () for vectors.",
    ),
    "channels": _IdentityLeaf(3, Integer(1), "Channels of an example. Image files have 3, or 1 for gray."),
    "low_resolution": _IdentityLeaf(
        0,
        Integer(0),
        "Height in pixels of the small images that an upsampler enlarges; 0 for other models.",
    ),
    "levels": _IdentityLeaf(
        256,
        optional(Integer(2, 256)),
        "Number of gray levels that a channel can have. Likelihoods are probabilities of these levels. None for continuous "
        "data: numbers that are not uint8, whose likelihoods are densities.",
    ),
    "normalization": _IdentityLeaf(
        "auto",
        Choice("auto", "limits", "none"),
        "How continuous data are scaled for the network. auto: each channel by its mean and standard deviation over "
        "`data.split`; limits: `data.limits` become [-1, 1]; none: not at all. Images of gray levels become [-1, 1].",
    ),
    "limits": _IdentityLeaf(
        (),
        Interval("none", finite=True),
        "The smallest and the largest value of continuous data, for the normalization limits.",
    ),
    "random_flip": _IdentityLeaf(
        True, Boolean(), "Whether each image is mirrored with probability 1/2. Only for images of gray levels."
    ),
    "memory_mb": Leaf(2048, Integer(0), "Megabytes of decoded data that are kept in memory. A larger set is streamed."),
    "cache_decoded": Leaf(
        True,
        Boolean(),
        "Whether decoded images that fit into `data.memory_mb` are kept in ~/.cache/diffusion_jax/decoded for later runs.",
    ),
    "workers": Leaf(8, Integer(0), "Number of processes that decode images when the data set is streamed."),
}

MODEL: dict[str, Leaf] = {
    "kind": _IdentityLeaf(
        "unet",
        Choice("unet", "mlp"),
        "Network: unet for arrays with 1, 2 or 3 spatial axes, mlp for vectors. An mlp has the leaves that are fields of "
        "`models.MLP`, and the others must keep their defaults.",
    ),
    "channels": _IdentityLeaf(128, Integer(4), "Width of the first resolution, a multiple of `model.num_groups`."),
    "channel_multipliers": _IdentityLeaf(
        (1, 2, 2, 2),
        Tuple(OneOf(Integer(1), Number(above=0)), "positive numbers", minimum_length=1, shown="(1, 2, 2)"),
        "Width of each resolution, as a multiple of `model.channels`. Each resolution halves the height and width.",
    ),
    "num_res_blocks": _IdentityLeaf(2, Integer(1), "Residual blocks at each resolution (one more in the decoder)."),
    "attention_levels": _IdentityLeaf(
        (1,),
        Tuple(Integer(0), "whole numbers of at least 0", shown="(1,), or () for none"),
        "Resolutions with self-attention; 0 is the full resolution. The middle of the network always has one layer.",
    ),
    "num_heads": _IdentityLeaf(1, Integer(1), "Attention heads of each layer."),
    "num_heads_up": _IdentityLeaf(
        None, optional(Integer(1)), "Attention heads in the decoder; None for `model.num_heads`."
    ),
    "head_channels": _IdentityLeaf(
        None, optional(Integer(1)), "Channels of an attention head, instead of `model.num_heads`; None for that."
    ),
    "resample_blocks": _IdentityLeaf(
        False, Boolean(), "Whether residual blocks change the resolution (ADM), instead of convolutions."
    ),
    "scale_shift_norm": _IdentityLeaf(
        False,
        Boolean(),
        "Whether the time embedding scales and shifts the second norm of a block, instead of being added.",
    ),
    "embedding_cos_first": _IdentityLeaf(
        False, Boolean(), "Whether the time embedding is [cos, sin] (OpenAI), instead of [sin, cos]."
    ),
    "embedding_freq_shift": _IdentityLeaf(
        1.0, Number(), "Shift in the exponent of the time embedding's frequencies: 1 as Ho et al., 0 as OpenAI."
    ),
    "downsample_padding": _IdentityLeaf(
        (0, 1),
        Tuple(Integer(0), "2 whole numbers", 2, 2, shown="(0, 1)"),
        "Padding before and after each side of a stride-2 convolution: (0, 1) as Ho et al., (1, 1) as OpenAI.",
    ),
    "padding": _IdentityLeaf(
        "zeros",
        Choice("zeros", "periodic"),
        "What convolutions see beyond the ends of an array: zeros, or its other end, for data on a torus.",
    ),
    "num_groups": _IdentityLeaf(32, Integer(1), "Groups of every group norm."),
    "norm_epsilon": _IdentityLeaf(
        1e-6, Number(minimum=0), "Epsilon of every group norm: 1e-6 as Ho et al., 1e-5 as OpenAI."
    ),
    "initializer": _IdentityLeaf(
        "ho", Choice("ho", "openai"), "Initialization of the weights, as Ho et al. or OpenAI."
    ),
    "dropout": _IdentityLeaf(0.1, Number(minimum=0, below=1), "Dropout rate in each residual block, in training only."),
    "num_classes": _IdentityLeaf(0, Integer(0), "Number of classes; 0 for an unconditional model."),
    "label_dropout": _IdentityLeaf(
        0.0,
        Number(minimum=0, below=1),
        "Probability that training drops a label, which classifier-free guidance needs; 0.1 is usual.",
    ),
    "condition_features": _IdentityLeaf(
        0, Integer(0), "Numbers in the condition of an example, a vector that the network embeds; 0 for none."
    ),
    "condition_channels": _IdentityLeaf(
        0,
        Integer(0),
        "Channels of the condition of an example, an array of the data's spatial shape; 0 for none.",
    ),
    "condition_dropout": _IdentityLeaf(
        0.0,
        Number(minimum=0, below=1),
        "Probability that training drops a condition, which classifier-free guidance needs; 0.1 is usual.",
    ),
    "joint_dropout": _IdentityLeaf(
        None,
        optional(Number(minimum=0, below=1)),
        "Probability that training drops a label and a condition together, a share of `model.label_dropout` and "
        "`model.condition_dropout`; None for the smaller of the two, 0 for independent draws.",
    ),
    "out_channels": _IdentityLeaf(
        None,
        optional(Integer(1)),
        "Channels of the output; None for the number that `data.channels` and `diffusion.variance` need.",
    ),
    "dtype": _IdentityLeaf(
        "float32",
        Choice("float32", "bfloat16"),
        "Type that the layers compute in. float16 is not supported, because its gradients underflow without loss scaling.",
    ),
    "precision": Leaf(
        "default",
        Choice("default", "high", "highest"),
        "Precision of float32 products. GPUs and TPUs by default round their inputs to TF32 or bfloat16, which is faster; "
        "highest is full float32. CPUs compute in float32 in each case. Likelihoods of the ODE use highest by default.",
    ),
    "remat": _IdentityLeaf(
        False,
        OneOf(Boolean(), Tuple(Integer(0), "resolutions", shown="(0,)")),
        "Whether the backward pass recomputes activations, for less memory and more time; or the resolutions whose blocks do "
        "so, of which 0, the full one, has most. An mlp has no resolutions.",
    ),
}

# The defaults of models.Classifier that differ from those of the U-Net: ADM's classifier of ImageNet at 128x128 pixels.
_CLASSIFIER_DEFAULTS = CLASSIFIER_PRESETS["adm_classifier128"]
_NOT_OF_CLASSIFIERS = ("kind", "num_heads_up", "label_dropout", "joint_dropout", "out_channels")
CLASSIFIER_MODEL: dict[str, Leaf] = {
    name: dataclasses.replace(leaf, default=_CLASSIFIER_DEFAULTS.get(name, leaf.default))
    for name, leaf in MODEL.items()
    if name not in _NOT_OF_CLASSIFIERS and not name.startswith("condition_")
} | {"num_classes": _IdentityLeaf(1000, Integer(2), "Number of classes.")}

DIFFUSION: dict[str, Leaf] = {
    "schedule": _IdentityLeaf("linear", Choice(*schedules.SCHEDULES), "Noise schedule, as `schedules.betas` names it."),
    "num_timesteps": _IdentityLeaf(1000, Integer(1), "Number of timesteps T of the diffusion process."),
    "beta_start": _IdentityLeaf(1e-4, Number(above=0, maximum=1), "First beta, of the schedules that have end points."),
    "beta_end": _IdentityLeaf(0.02, Number(above=0, maximum=1), "Last beta, of the schedules that have end points."),
    "prediction": _IdentityLeaf("eps", Choice(*process.PREDICTIONS), "Quantity that the network predicts."),
    "rescale_timesteps": _IdentityLeaf(False, Boolean(), "Whether the network time is t * 1000 / T, instead of t."),
    "variance": _IdentityLeaf(
        "fixed_large",
        Choice(*process.VARIANCES),
        "Variance of p(x_{t-1} | x_t). The learned ones need the loss vlb or hybrid.",
    ),
    "loss": _IdentityLeaf(
        "simple",
        Choice(*losses.LOSSES),
        "Training loss. vlb: the variational bound; hybrid: simple plus the bound, for a learned variance; classify: the "
        "cross entropy of a classifier of noisy images, for guidance.",
    ),
    "vlb_weight": _IdentityLeaf(0.001, Number(minimum=0), "Weight of the variational bound in the hybrid loss."),
    "conditioning_noise": _IdentityLeaf(
        0.0,
        Number(minimum=0),
        "Largest standard deviation of the noise on an upsampler's small images; 0 for exact ones.",
    ),
    "weighting": _IdentityLeaf(
        "none", Choice("none", *losses.WEIGHTINGS), "Weight of each timestep in the simple loss."
    ),
    "timestep_sampler": _IdentityLeaf(
        "uniform", Choice(*timesteps.SAMPLERS, "loss_second_moment"), "How the timesteps of a batch are drawn."
    ),
}

TRAINING: dict[str, Leaf] = {
    "num_steps": Leaf(800_000, Integer(1), "Number of training steps."),
    "batch_size": _IdentityLeaf(128, Integer(1), "Images in a step, over all devices together."),
    "accumulation_steps": Leaf(
        1, Integer(1), "Number of microbatches that a batch is split into: less memory, the same step."
    ),
    "steps_per_call": Leaf(
        1, Integer(1), "Steps in one compiled program, on accelerators. On a CPU each step is a separate call."
    ),
    "deterministic": Leaf(False, Boolean(), "Whether runs on a GPU are bit-identical, which makes them slower."),
    "log_every": Leaf(100, Integer(1), "Steps between two lines of metrics."),
    "sample_every": Leaf(10_000, Integer(0), "Steps between two pictures of samples; 0 for none."),
    "checkpoint_every": Leaf(5_000, Integer(1), "Steps between two checkpoints."),
    "checkpoints_kept": Leaf(3, Integer(1), "Number of newest checkpoints that are kept."),
    "checkpoint_keep_every": Leaf(
        100_000, Integer(0), "Steps between two checkpoints that are never deleted; 0 for none."
    ),
    "stall_timeout": Leaf(
        600.0, Number(minimum=0), "Seconds without a finished step after which the program ends; 0 for no limit."
    ),
    "profile": Leaf(False, Boolean(), "Whether five steps, soon after the start, are traced for XProf."),
}

OPTIMIZER: dict[str, Leaf] = {
    "name": _IdentityLeaf("adam", Choice("adam", "adamw"), "Optimizer, from optax."),
    "learning_rate": _IdentityLeaf(2e-4, Number(above=0), "Learning rate after the warm-up."),
    "warmup_steps": _IdentityLeaf(5_000, Integer(0), "Steps of linear warm-up from 0."),
    "schedule": _IdentityLeaf(
        "constant",
        Choice("constant", "linear", "cosine"),
        "Learning-rate schedule after the warm-up. linear and cosine reach 0 at `optimizer.decay_steps`.",
    ),
    "decay_steps": _IdentityLeaf(800_000, Integer(0), "Step at which the schedules linear and cosine reach 0."),
    "b1": _IdentityLeaf(0.9, Number(minimum=0, below=1), "Decay rate of the first moment."),
    "b2": _IdentityLeaf(0.999, Number(minimum=0, below=1), "Decay rate of the second moment."),
    "eps": _IdentityLeaf(1e-8, Number(minimum=0), "Epsilon in the denominator of the update."),
    "weight_decay": _IdentityLeaf(0.0, Number(minimum=0), "Weight decay, of adamw."),
    "grad_clip": _IdentityLeaf(1.0, Number(minimum=0), "Largest global norm of the gradient; 0 for no clipping."),
}

LOGGING: dict[str, Leaf] = {
    "writers": Leaf(
        ("tensorboard",),
        Tuple(
            Choice("tensorboard", "wandb", "mlflow", "trackio"),
            "names from tensorboard, wandb, mlflow, trackio",
            shown="('tensorboard', 'wandb')",
        ),
        "Where metrics and pictures of training are written besides metrics.jsonl. The trackers are packages of their own, "
        "which their environment variables configure.",
    ),
    "project": Leaf(
        "diffusion_jax", Text(), "Project of the run in a tracker, where the run has the name of the work directory."
    ),
}

EMA: dict[str, Leaf] = {
    "decay": _IdentityLeaf(0.9999, Number(minimum=0, maximum=1), "Decay rate of the moving average of the parameters."),
    "warmup": _IdentityLeaf(False, Boolean(), "Whether the decay rate is min(decay, (1 + step) / (10 + step))."),
}

MESH: dict[str, Leaf] = {
    "data": Leaf(
        -1,
        OneOf(Integer(-1, -1), Integer(1)),
        "Number of devices that split the batch; -1 for all devices that `mesh.fsdp` leaves.",
    ),
    "fsdp": Leaf(
        1,
        Integer(1),
        "Number of devices that split the batch, and also parameters, optimizer state and moving average.",
    ),
    "device": Leaf(
        None,
        optional(Choice("v4", "v5e", "a100", "h100")),
        "Kind of device whose memory `--mode=plan` fits the settings to; None for no proposal. Only that mode uses it.",
    ),
}


class _Steps(OneOf):
    """A number of steps, several numbers, or None, with advice for 0 and for OpenAI's "ddim50" and "10,15,20"."""

    def check(self, value: Any) -> Any:
        try:
            return super().check(value)
        except ValueError:
            counts = value.removeprefix("ddim").replace(" ", "") if isinstance(value, str) else ""
            if counts.replace(",", "").isdecimal():
                spacing = "openai_ddim" if value.startswith("ddim") else "openai"
                raise ValueError(f"type --config.sampling.steps={counts} --config.sampling.spacing={spacing}") from None
            raise ValueError("write None for all timesteps" if value == 0 else "") from None

    def parse(self, text: str) -> Any:
        if text == "0":
            return self.check(0)
        try:
            return super().parse(text)
        except ValueError:
            return self.check(text)


SAMPLING: dict[str, Leaf] = {
    "sampler": Leaf(
        "ddpm",
        Choice("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm_solver_pp", "unipc", "deis", "pndm", "plms"),
        "Algorithm that draws the samples.",
    ),
    "steps": Leaf(
        None,
        _Steps(
            Nothing(),
            Integer(1),
            Tuple(OneOf(Integer(0), Number(minimum=0)), "numbers", minimum_length=1, shown="(10, 15, 20)"),
        ),
        "Number of sampling steps; None for all timesteps. With the spacing openai also one number for each section of the "
        "chain, (10, 15, 20); with the spacing given the network times themselves, rising.",
    ),
    "spacing": Leaf(
        None,
        optional(Choice(*schedules.SPACINGS, "openai_ddim", "given")),
        "How the steps are spread over the timesteps; None for the default of the sampler: log_snr for heun, pndm and plms, "
        "and for an unclipped eps network whose errors would grow, "
        'otherwise trailing. openai_ddim is OpenAI\'s "ddim50".',
    ),
    "eta": Leaf(0.0, Number(minimum=0, maximum=1), "Noise of ddim: 0 is deterministic, 1 ancestral sampling."),
    "order": Leaf(2, Choice(1, 2, 3), "Order of dpm_solver_pp, unipc and deis."),
    "clip": Leaf(
        None,
        OneOf(Boolean(), Choice("dynamic"), Nothing()),
        "Whether x_0 is clipped to [-1, 1] at every step; None follows the data: True for gray levels and for `data.limits`, "
        "False for other continuous data. dynamic: to a quantile of |x_0|, which is then scaled to 1.",
    ),
    "clip_quantile": Leaf(0.995, Number(above=0, maximum=1), "Quantile of the dynamic clipping."),
    "label": Leaf(
        None,
        OneOf(
            Nothing(),
            Integer(0),
            Tuple(OneOf(Integer(0), Text()), "class numbers or names", 1, shown="(3, 5)", brackets=True),
            Text(),
        ),
        "Class of the samples, by number or name, or several that take turns; None for all classes. On the command line "
        "`--config.sampling.class` is an alias.",
    ),
    "guidance_scale": Leaf(
        1.0,
        Number(),
        "Scale of classifier-free guidance: 1 for none, 0 for unconditional. It needs `model.label_dropout`.",
    ),
    "guidance_interval": Leaf((), Interval("all"), "Range of network times in which guidance is applied."),
    "guidance_rescale": Leaf(
        0.0, Number(minimum=0, maximum=1), "How much of guidance's change of contrast is removed."
    ),
    "classifier": Leaf(
        "",
        Text(),
        'Guiding classifier: its work directory, or a path as `pretrained.load` takes it; "" for none.',
    ),
    "classifier_flags": Leaf(
        "", Text(), "Settings that the weights of the classifier do not contain, as `init_flags`."
    ),
    "classifier_scale": Leaf(1.0, Number(), "Scale of classifier guidance."),
    "classifier_form": Leaf(
        "eps",
        Choice("eps", "mean"),
        "Quantity that the classifier shifts: the predicted noise, or the mean of the sampler ddpm (ADM).",
    ),
    "low_resolution": Leaf(
        "", Text(), "Small images that an upsampler enlarges: an .npz of --mode=sample, or a folder of images."
    ),
    "low_resolution_noise": Leaf(
        0.0,
        Number(minimum=0),
        "Standard deviation of the noise on the small images, up to `diffusion.conditioning_noise`.",
    ),
    "conditions": Leaf(
        "",
        Text(),
        'Conditions of the samples, in the units of the data: an .npy, or an .npz with "condition". Sample i has row i '
        "modulo the number of rows.",
    ),
    "num_samples": Leaf(
        64,
        Integer(1),
        "Number of samples of --mode=sample; the modes edit and evaluate have `editing.num_samples` and "
        "`evaluation.num_samples`.",
    ),
    "batch_size": Leaf(64, Integer(1), "Samples that are drawn at a time."),
    "seed": Leaf(0, SEED, "Seed of the samples."),
    "use_ema": Leaf(
        True,
        Boolean(),
        "Whether the moving average of the parameters is used. While it holds more than a tenth of the random initial "
        "weights, the raw weights replace it.",
    ),
    "trajectory": Leaf(
        0,
        OneOf(Integer(0, 0), Integer(2)),
        "Columns of the picture of the first samples being denoised, fewer if steps would look alike; 0 for none.",
    ),
    "preview_samples": Leaf(
        16, Integer(0), "Samples in the pictures during training, which are drawn by DDIM; 0 for no pictures."
    ),
    "preview_steps": Leaf(25, Integer(1), "Sampling steps of the pictures during training."),
}

EDITING: dict[str, Leaf] = {
    "task": Leaf(
        "inpaint",
        Choice("inpaint", "replace", "sdedit", "colorize", "super_resolution", "interpolate"),
        "Task of --mode=edit, which uses the sampler of `sampling`. inpaint is RePaint, replace its form without resampling.",
    ),
    "image": Leaf(
        "",
        Text(),
        "File of the image to edit. For data that are not images, an .npy of one example [*spatial, C] in their units.",
    ),
    "mask": Leaf(
        "",
        Text(),
        "File of the mask of inpaint and replace: an image that is white where pixels are known, or a bool .npy that is True "
        "where values are known.",
    ),
    "other": Leaf("", Text(), "File of the second image or example of interpolate."),
    "num_samples": Leaf(
        8, Integer(1), "Number of results; for interpolate, images from one to the other, both included."
    ),
    "resamplings": Leaf(10, Integer(1), "Resamplings of inpaint."),
    "jump": Leaf(10, Integer(1), "Length of the jumps of inpaint, in steps."),
    "strength": Leaf(0.5, Number(above=0, maximum=1), "How much sdedit may change."),
    "factor": Leaf(4, Integer(1), "Factor of super_resolution."),
    "level": Leaf(
        None,
        optional(Integer(0)),
        "Step at which interpolate mixes the noised images; None mixes their encodings, for deterministic samplers.",
    ),
}

_IMAGE_METRICS = ("fid", "sfid", "kid", "is", "precision_recall", "density_coverage", "memorization")
_ARRAY_METRICS = ("energy_distance", "sliced_wasserstein", "marginal_histograms", "mean_and_covariance")
_ARRAY_METRICS += ("power_spectrum", "autocorrelation")

EVALUATION: dict[str, Leaf] = {
    "split": Leaf("test", Text(), "Split whose likelihood is measured."),
    "data_dir": Leaf(
        "",
        Text(),
        'Directory of that split; a folder has none unless `data.holdout` makes them. "" for `data.data_dir`.',
    ),
    "num_examples": Leaf(0, Integer(0), "Number of examples measured, the first of the split; 0 for all."),
    "batch_size": Leaf(64, Integer(1), "Examples that are measured at a time."),
    "strata": Leaf(
        None,
        optional(Integer(1)),
        "Strata of the timesteps of the bound. None visits every timestep of every example; S visits the first and two in "
        "each of S strata.",
    ),
    "cdf": Leaf("exact", Choice(*likelihood.CDFS), "CDF of the discretized Gaussian; tanh is OpenAI's approximation."),
    "clip": Leaf(
        None,
        optional(Boolean()),
        "Whether x_0 is clipped to [-1, 1], as in the figures of Ho et al. and OpenAI; None as for `sampling.clip`.",
    ),
    "seed": Leaf(0, SEED, "Seed of the noise of the measurements."),
    "use_ema": Leaf(
        True, Boolean(), "Whether the moving average of the parameters is measured, as `sampling.use_ema` for samples."
    ),
    "ode": Leaf(False, Boolean(), "Whether the likelihood of the probability-flow ODE is measured, too."),
    "ode_dequantization": Leaf(
        None,
        optional(Choice("uniform", "variational", "none")),
        "Dequantization of the ODE's likelihood; None for uniform with gray levels, and none with continuous data.",
    ),
    "ode_trace": Leaf(
        "hutchinson",
        Choice("hutchinson", "exact"),
        "How the divergence is computed; exact takes as many derivatives as an example has values.",
    ),
    "ode_tolerance": Leaf(1e-5, Number(above=0), "Error tolerance of the ODE solver."),
    "likelihood": Leaf(True, Boolean(), "Whether --mode=evaluate measures the variational bound."),
    "num_samples": Leaf(
        50_000, Integer(0), "Number of samples that --mode=evaluate compares with the data; 0 for none."
    ),
    "features": Leaf(
        "",
        Text(),
        'Feature extractor: inception, digits, or module:function (examples to features); "" for digits on that data set, '
        "none for continuous data, and otherwise inception.",
    ),
    "inception": Leaf(
        "",
        Text(),
        'File of Inception\'s weights, a .pth or the TensorFlow graph; "" for no metrics of samples.',
    ),
    "resize": Leaf(
        "tf1",
        Choice("tf1", "pytorch", "clean"),
        "How images are resized to Inception's 299 pixels: as TensorFlow's FID, pytorch-fid or clean-fid.",
    ),
    "metrics": Leaf(
        None,
        optional(
            Tuple(
                Choice(*_IMAGE_METRICS, *_ARRAY_METRICS),
                f"names from {', '.join((*_IMAGE_METRICS, *_ARRAY_METRICS))}",
                minimum_length=1,
                shown="('fid',)",
            )
        ),
        "Metrics of samples; None for all that suit the data. Images have those from fid to memorization, continuous data "
        "those from memorization to autocorrelation, and with their own `evaluation.features` also fid, kid, "
        "precision_recall and density_coverage. Use `evaluation.num_samples=0` for none.",
    ),
    "reference_split": Leaf("", Text(), 'Split that samples are compared with; "" for `data.split`.'),
    "every": Leaf(0, Integer(0), "Training steps between two measurements of the FID, of few samples; 0 for none."),
    "every_samples": Leaf(1000, Integer(2), "Samples of the FID during training."),
}

# Each group's description and leaves, in the order of the reference.
GROUPS: dict[str, tuple[str, dict[str, Leaf]]] = {
    "": ("The run as a whole.", ROOT),
    "data": ("Training data.", DATA),
    "model": ("The network: the fields of `models.UNet`.", MODEL),
    "diffusion": ("The diffusion process and the loss.", DIFFUSION),
    "training": ("Lengths and intervals of training.", TRAINING),
    "optimizer": ("The optimizer.", OPTIMIZER),
    "ema": ("The moving average of the parameters.", EMA),
    "mesh": ("The devices.", MESH),
    "logging": ("Metrics and pictures of training.", LOGGING),
    "sampling": ("Samples (`--mode=sample`, and the pictures during training).", SAMPLING),
    "editing": ("Edits of images and arrays (`--mode=edit`).", EDITING),
    "evaluation": ("Likelihood and metrics of samples (`--mode=evaluate`).", EVALUATION),
}


def _by_name(groups: Mapping[str, tuple[str, dict[str, Leaf]]]) -> dict[str, Leaf]:
    return {
        f"{group}.{name}" if group else name: leaf
        for group, (_, leaves) in groups.items()
        for name, leaf in leaves.items()
    }


LEAVES = _by_name(GROUPS)
# With diffusion.loss=classify the config trains a classifier, whose network has other fields.
CLASSIFIER_LEAVES = _by_name(GROUPS | {"model": ("The network: the fields of `models.Classifier`.", CLASSIFIER_MODEL)})


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested leaves as {"group.leaf": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def identity_leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that must agree between the launches of one run, as {"group.leaf": value}."""
    return {name: value for name, value in flatten(config).items() if name in LEAVES and LEAVES[name].identity}


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a complete config trains a classifier of noisy images instead of a diffusion model."""
    return config["diffusion"]["loss"] == "classify"


def is_upsampler(config: Mapping[str, Any]) -> bool:
    """Whether the diffusion model of a complete config enlarges small images, which are an input of its network."""
    return bool(config["data"]["low_resolution"])


def is_continuous(config: Mapping[str, Any]) -> bool:
    """Whether the data of a complete config are float numbers without gray levels."""
    return config["data"]["levels"] is None


def clips_by_default(config: Mapping[str, Any]) -> bool:
    """Whether the data of a complete config lie in [-1, 1], so that the predicted x_0 is clipped to it."""
    return not is_continuous(config) or config["data"]["normalization"] == "limits"


def resolve_clip(config: Mapping[str, Any], group: str = "sampling") -> bool | str:
    """The leaf `clip` of a group of a complete config; None follows the data."""
    clip = config[group]["clip"]
    return clips_by_default(config) if clip is None else clip


_INTRODUCTION = """# Configuration

A config is a nested mapping of leaves, `group.leaf`. An experiment of `configs/` differs from the defaults in some leaves,
and so may any mapping:

    from diffusion_jax import config, training

    cfg = config.experiment("digits")                                   # or config.default(), DDPM on CIFAR-10
    state, train_step = training.create({"data": {"dataset": "digits", "image_size": 8, "channels": 1}})

`config.resolve(mapping)` completes a mapping with the defaults and checks it: an unknown leaf, or a value that its leaf does
not allow, raises `ConfigError` with one line that gives the value, what is allowed and what to type. On the command line,
`--config.group.leaf=VALUE` overrides a leaf: whole numbers may be written as 1e4, tuples as `1,2` or `"(1, 2)"`, and `None`
if it is allowed.

The column "identity" shows which leaves decide the numbers of a run: a relaunch in the same work directory must not change
them. The others may change between launches.

`make reference` writes this page from `config.reference()`.
"""


def reference() -> str:
    """The reference of all leaves in Markdown: docs/reference/configuration.md."""
    return "\n".join([_INTRODUCTION, *_reference_lines()])


def _reference_lines() -> Iterator[str]:
    for group, (description, leaves) in GROUPS.items():
        yield from _group_lines(f"`{group}`" if group else "Leaves without a group", description, leaves)
        if group == "model":
            heading = "`model` of a classifier (`diffusion.loss=classify`)"
            missing = ", ".join(f"`{name}`" for name in MODEL if name not in CLASSIFIER_MODEL)
            text = f"The fields of `models.Classifier`: those of the U-Net, except {missing}."
            yield from _group_lines(heading, text, CLASSIFIER_MODEL)


def _group_lines(heading: str, description: str, leaves: Mapping[str, Leaf]) -> Iterator[str]:
    yield f"## {heading}"
    yield ""
    yield description
    yield ""
    yield "| leaf | default | allowed | identity | description |"
    yield "|---|---|---|---|---|"
    for name, leaf in leaves.items():
        cells = (
            f"`{name}`",
            f"`{leaf.default!r}`",
            leaf.kind.allowed,
            "yes" if leaf.identity else "no",
            leaf.description,
        )
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
