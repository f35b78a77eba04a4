"""The table of all settings, by group, and predicates on a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion_jax import editing, likelihood, losses, sampling, schedules, timesteps
from diffusion_jax.config.presets import CLASSIFIER_PRESETS
from diffusion_jax.config.values import (
    Boolean,
    Choice,
    FunctionName,
    Integer,
    Interval,
    NamedValues,
    Number,
    OneOf,
    Text,
    Topology,
    Tuple,
    ValueKind,
    optional,
)
from diffusion_jax.denoiser import PREDICTIONS, VARIANCES
from diffusion_jax.metrics import METRICS
from diffusion_jax.schedules.schedule import MAX_TIMESTEPS


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting in the config.

    default: the value in DDPM's run on CIFAR-10. kind: the allowed values. description: a text for the reference page; errors
    show its first sentence.
    """

    default: Any
    kind: ValueKind
    description: str

    @property
    def imports(self) -> bool:
        """Whether a value with a colon names a function that is imported."""
        return any(isinstance(kind, FunctionName) for kind in _parts(self.kind))

    @property
    def is_path(self) -> bool:
        """Whether a value is a path or a URL."""
        return any(kind is PATH for kind in _parts(self.kind))


def _parts(kind: Any) -> list[Any]:
    """Returns the kind and the kinds in it."""
    parts = kind.kinds if isinstance(kind, OneOf) else [kind.item] if isinstance(kind, Tuple) else ()
    return [kind, *(part for each in parts for part in _parts(each))]


SEED = Integer(0, 2**32 - 1)
SHARE = Number(minimum=0, below=1)
PATH = Text()

ROOT: dict[str, Setting] = {
    "seed": Setting(0, SEED, "Seed of the initial parameters, the batches and the noise of training."),
    "init_from": Setting(
        "", PATH, "Weights that training starts from: a path or hf://OWNER/NAME, as for `pretrained.load`."
    ),
    "init_flags": Setting(
        "", Text(), "Flags for `init_from`, as for `pretrained.load`: a preset's name, OpenAI's flags, or JSON."
    ),
}

DATA: dict[str, Setting] = {
    "dataset": Setting(
        "cifar10",
        OneOf(FunctionName(), Text()),
        'Name of a TFDS data set, "folder" (images below `data.data_dir`), "arrays" (.npy, .npz, .zarr or .h5 at '
        '`data.data_dir`), "digits" (scikit-learn\'s), or a function from `config.data` to a `data.Source`.',
    ),
    "data_dir": Setting("", PATH, 'TFDS directory ("" for ~/tensorflow_datasets), image folder, or array file.'),
    "download": Setting(True, Boolean(), "Whether a missing TFDS data set is downloaded and prepared."),
    "split": Setting("train", Text(), "Training split of the data set."),
    "holdout": Setting(
        0.0,
        SHARE,
        "Share of a folder's or file's examples that forms the split test and is never trained on. A hash of each example's "
        "path or values decides.",
    ),
    "image_size": Setting(
        32,
        OneOf(Integer(1), Tuple(Integer(1), "0 to 3 whole numbers", maximum_length=3, shown="(32, 48)")),
        "Side length for square images, or the size of each spatial axis: (height, width) for images, (length,) for "
        "series, () for vectors.",
    ),
    "channels": Setting(3, Integer(1), "Channels of an example. Image files have 3, or 1 for gray."),
    "channel_names": Setting(
        (), Tuple(Text(), "texts", shown="('u', 'v')"), "Names of the channels in pictures; () for numbers."
    ),
    "channel_units": Setting(
        (),
        Tuple(Text(), "texts", shown="('m/s', 'm/s')"),
        'Units of the channels in pictures, "" for no unit; () for "data units".',
    ),
    "low_resolution": Setting(
        0, Integer(0), "Height of the small images that an upsampler enlarges; 0 for other models."
    ),
    "levels": Setting(
        256,
        optional(Integer(2, 256)),
        "Number of gray levels per channel, for likelihoods that are probabilities. None for continuous data, whose "
        "likelihoods are densities.",
    ),
    "normalization": Setting(
        "auto",
        Choice("auto", "limits", "none"),
        "Scale of continuous data. auto: each channel by its mean and standard deviation over `data.split`; limits: "
        "`data.limits` become [-1, 1]; none: unchanged. Gray-level images always become [-1, 1].",
    ),
    "limits": Setting(
        (), Interval(Number(), "two rising numbers"), "Range of continuous data, for the normalization limits."
    ),
    "random_flip": Setting(
        True, Boolean(), "Whether each image is mirrored with probability 1/2. Gray-level images only."
    ),
    "memory_mb": Setting(
        2048, Integer(0), "Memory limit for decoded data, in megabytes. A larger data set is streamed."
    ),
    "disk_mb": Setting(
        100_000,
        Integer(0),
        "Disk limit for a TFDS data set in a bucket, in megabytes. A larger array_record data set is downloaded file by file "
        "during training, and shuffled by files; the files in use, up to 48, are kept beyond the limit.",
    ),
    "cache_decoded": Setting(
        True,
        Boolean(),
        "Whether decoded images that fit into `data.memory_mb` are kept on disk, except for data above `data.disk_mb`.",
    ),
    "workers": Setting(8, Integer(0), "Number of processes that decode the images in a streamed data set."),
}

MODEL: dict[str, Setting] = {
    "kind": Setting(
        "unet",
        OneOf(Choice("unet", "mlp"), FunctionName()),
        "Network: unet for arrays with 1, 2 or 3 spatial axes, mlp for vectors, or a function that makes your own. Settings "
        "of `model` that the network does not have must keep their defaults.",
    ),
    "options": Setting(
        {}, NamedValues(), "Keyword arguments of the function in `model.kind`, as in --config.model.options.depth=4."
    ),
    "channels": Setting(128, Integer(4), "Width at the first resolution, a multiple of `model.num_groups`."),
    "channel_multipliers": Setting(
        (1, 2, 2, 2),
        Tuple(OneOf(Integer(1), Number(above=0)), "positive numbers", minimum_length=1, shown="(1, 2, 2)"),
        "Width at each resolution, as a multiple of `model.channels`. Each resolution halves the height and width.",
    ),
    "num_res_blocks": Setting(2, Integer(1), "Residual blocks at each resolution; the decoder has one more."),
    "attention_levels": Setting(
        (1,),
        Tuple(Integer(0), "whole numbers of at least 0", shown="(1,), or () for none"),
        "Resolutions with self-attention; 0 is the full resolution. The middle of the network always has self-attention.",
    ),
    "num_heads": Setting(1, Integer(1), "Attention heads of each layer."),
    "head_channels": Setting(
        None, optional(Integer(1)), "Channels of an attention head; None for `model.num_heads` heads."
    ),
    "resample_blocks": Setting(
        False, Boolean(), "Whether residual blocks change the resolution (ADM), instead of convolutions."
    ),
    "scale_shift_norm": Setting(
        False, Boolean(), "Whether the time embedding scales and shifts a block's second norm, instead of being added."
    ),
    "architecture": Setting(
        "ddpm",
        Choice("ddpm", "ddpm++", "ncsn++"),
        "Variant of the network: ddpm (Ho et al., OpenAI), or ddpm++ or ncsn++ (Song et al., EDM; also set "
        "`model.resample_blocks`, and for ncsn++ `diffusion.path=edm` and `optimizer.frozen=time_fourier`).",
    ),
    "embedding_cos_first": Setting(
        False, Boolean(), "Whether the time embedding is [cos, sin] (OpenAI), instead of [sin, cos]."
    ),
    "embedding_freq_shift": Setting(
        1.0, Number(), "Shift in the exponent of the time embedding's frequencies: 1 as Ho et al., 0 as OpenAI."
    ),
    "time_scale": Setting(
        1.0,
        Number(above=0),
        "Factor of the network time before its embedding: 1000 in OpenAI's networks with EDM's scaling.",
    ),
    "downsample_padding": Setting(
        (0, 1),
        Tuple(Integer(0), "2 whole numbers", 2, 2, shown="(0, 1)"),
        "Padding before and after each side of a stride-2 convolution: (0, 1) as Ho et al., (1, 1) as OpenAI.",
    ),
    "padding": Setting(
        "zeros", Choice("zeros", "periodic"), "Padding of convolutions; periodic is for data on a torus."
    ),
    "num_groups": Setting(32, Integer(1), "Groups in every group norm."),
    "norm_epsilon": Setting(1e-6, Number(minimum=0), "Epsilon in every group norm: 1e-6 as Ho et al., 1e-5 as OpenAI."),
    "initializer": Setting("ho", Choice("ho", "openai"), "Initialization of the weights, as Ho et al. or OpenAI."),
    "dropout": Setting(0.1, SHARE, "Dropout rate in each residual block, in training only."),
    "num_classes": Setting(0, Integer(0), "Number of classes; 0 for an unconditional model."),
    "label_dropout": Setting(
        0.0, SHARE, "Probability that training drops a label, which classifier-free guidance needs; 0.1 is usual."
    ),
    "condition_features": Setting(0, Integer(0), "Length of an example's condition vector; 0 for none."),
    "condition_channels": Setting(0, Integer(0), "Channels of an example's condition array; 0 for none."),
    "condition_dropout": Setting(
        0.0, SHARE, "Probability that training drops a condition, which classifier-free guidance needs; 0.1 is usual."
    ),
    "dtype": Setting("float32", Choice("float32", "bfloat16"), "Type that the layers compute in."),
    "precision": Setting(
        "default",
        Choice("default", "high", "highest"),
        "Precision of float32 products on GPUs and TPUs: default rounds inputs to TF32 or bfloat16, highest is float32.",
    ),
    "remat": Setting(
        False,
        OneOf(Boolean(), Tuple(Integer(0), "resolutions", shown="(0,)")),
        "Whether the backward pass recomputes activations, for less memory and more time; or the resolutions to recompute.",
    ),
}

# Settings that every network has; the others describe the layers of one kind of network.
_COMMON = (
    "num_classes",
    "label_dropout",
    "condition_features",
    "condition_channels",
    "condition_dropout",
    "dropout",
    "dtype",
)
NETWORK_SETTINGS = tuple(f"model.{name}" for name in MODEL if name not in _COMMON)

DIFFUSION: dict[str, Setting] = {
    "schedule": Setting(
        "linear",
        OneOf(Choice(*schedules.SCHEDULES), FunctionName()),
        "Noise schedule, as `schedules.betas` names it, or a function from T to T betas.",
    ),
    "num_timesteps": Setting(1000, Integer(1, MAX_TIMESTEPS), "Number of timesteps T in the diffusion process."),
    "path": Setting(
        None,
        OneOf(Choice(*schedules.PATHS), Choice(None), FunctionName()),
        "Path, as `schedules.PATHS` names it, or a function () -> path. Training draws the path's continuous noise levels, "
        "instead of the schedule's. Sampling and likelihoods use T levels: evenly spaced in the log SNR for likelihoods with "
        "variance=fixed_small, otherwise in network time. None for the schedule.",
    ),
    "log_snr_shift": Setting(
        0.0, Number(), "Number that is added to the log SNR of a path, and of every draw, for larger images."
    ),
    "draw": Setting(
        "uniform",
        OneOf(Choice("uniform", "log_normal", "logit_normal", "uniform_log_snr"), FunctionName()),
        "Distribution of a batch's noise levels on a path, in place of `timestep_sampler`, or a function (key, batch size, "
        "path) -> (time, log density); uniform leaves the choice to `timestep_sampler`.",
    ),
    "draw_mean": Setting(
        None,
        optional(Number()),
        "Mean of log_normal and logit_normal; None for the published values, -1.2 and 0. EDM's -1.2 is for data with "
        "standard deviation 0.5; for standardized data, the same levels have the mean -0.51.",
    ),
    "draw_std": Setting(
        None, optional(Number(above=0)), "Standard deviation of log_normal and logit_normal; None as published."
    ),
    "preconditioning": Setting(
        "none",
        Choice("none", "edm", "consistency"),
        "Scales of the network's input and output; edm needs prediction=x_0, consistency is for published weights.",
    ),
    "sigma_data": Setting(
        None,
        optional(Number(above=0)),
        "Standard deviation of x_0 in EDM's preconditioning and weighting; None for 0.5, or 1 for standardized data.",
    ),
    "beta_start": Setting(1e-4, Number(above=0, maximum=1), "First beta, for schedules with end points."),
    "beta_end": Setting(0.02, Number(above=0, maximum=1), "Last beta, for schedules with end points."),
    "prediction": Setting("eps", Choice(*PREDICTIONS), "Quantity that the network predicts."),
    "rescale_timesteps": Setting(False, Boolean(), "Whether the network time is t * 1000 / T, instead of t."),
    "variance": Setting(
        "fixed_large",
        Choice(*VARIANCES),
        "Variance of p(x_{t-1} | x_t). A learned variance needs the loss vlb or hybrid.",
    ),
    "loss": Setting(
        "simple",
        OneOf(Choice(*losses.LOSSES), FunctionName()),
        "Training loss, or a function as `losses.simple`. vlb: the variational bound; hybrid: simple plus the bound, for a "
        "learned variance; continuous_vlb: the bound on a path; classify: the cross entropy of a noise-aware classifier, for "
        "guidance.",
    ),
    "vlb_weight": Setting(0.001, Number(minimum=0), "Weight of the variational bound in the hybrid loss."),
    "conditioning_noise": Setting(
        0.0, Number(minimum=0), "Largest standard deviation of the noise on an upsampler's small images; 0 for none."
    ),
    "weighting": Setting(
        "none",
        OneOf(Choice("none", *losses.WEIGHTINGS), FunctionName()),
        "Weight of each noise level in the simple loss, or a function from the SNR to a weight on the eps error.",
    ),
    "timestep_sampler": Setting(
        "uniform",
        OneOf(Choice(*timesteps.TIMESTEP_SAMPLERS), FunctionName()),
        "Distribution of a batch's noise levels, or a function (key, batch size, T) -> (t, weight) or, on a path, (key, "
        "batch size, path) -> (time, log density). stratified also makes `draw` cover all levels evenly in each batch.",
    ),
}

TRAINING: dict[str, Setting] = {
    "num_steps": Setting(800_000, Integer(1), "Number of training steps."),
    "batch_size": Setting(128, Integer(1), "Examples per step, over all devices."),
    "accumulation_steps": Setting(
        1, Integer(1), "Microbatches that a batch is split into: less memory, the same step."
    ),
    "steps_per_call": Setting(1, Integer(1), "Steps per compiled program on accelerators; always 1 on a CPU."),
    "deterministic": Setting(False, Boolean(), "Whether GPU runs are bit-identical, which is slower."),
    "log_every": Setting(100, Integer(1), "Steps between two lines of metrics."),
    "sample_every": Setting(10_000, Integer(0), "Steps between two pictures of samples; 0 for none."),
    "checkpoint_every": Setting(5_000, Integer(1), "Steps between two checkpoints."),
    "checkpoints_kept": Setting(3, Integer(1), "Number of newest checkpoints to keep."),
    "checkpoint_keep_every": Setting(
        100_000, Integer(0), "Steps between two checkpoints that are kept forever; 0 for none."
    ),
    "stall_timeout": Setting(
        600.0, Number(minimum=0), "Seconds without a finished step after which the program ends; 0 for no limit."
    ),
    "profile": Setting(False, Boolean(), "Whether five steps, soon after the start, are traced for XProf."),
}

OPTIMIZER: dict[str, Setting] = {
    "name": Setting(
        "adam",
        OneOf(Choice("adam", "adamw"), FunctionName()),
        "Optimizer of optax, or a function (learning rate schedule, `config.optimizer`) -> optax transformation.",
    ),
    "frozen": Setting(
        (),
        OneOf(Tuple(Text(), "patterns", shown="('down_*', 'mid_*')"), FunctionName()),
        "Parameters that training does not change: patterns of names, such as network/* for your own network, or a "
        "function from a name to a bool; () for none.",
    ),
    "learning_rate": Setting(2e-4, Number(above=0), "Learning rate after the warm-up."),
    "warmup_steps": Setting(5_000, Integer(0), "Steps of linear warm-up from 0."),
    "schedule": Setting(
        "constant", Choice("constant", "linear", "cosine"), "Learning-rate schedule after the warm-up."
    ),
    "decay_steps": Setting(800_000, Integer(0), "Step at which the schedules linear and cosine reach 0."),
    "b1": Setting(0.9, SHARE, "Decay rate of the first moment."),
    "b2": Setting(0.999, SHARE, "Decay rate of the second moment."),
    "eps": Setting(1e-8, Number(minimum=0), "Epsilon in the denominator of the update."),
    "weight_decay": Setting(0.0, Number(minimum=0), "Weight decay, for adamw."),
    "grad_clip": Setting(1.0, Number(minimum=0), "Largest global norm of the gradient; 0 for no clipping."),
}

LOGGING: dict[str, Setting] = {
    "writers": Setting(
        ("tensorboard",),
        Tuple(
            OneOf(Choice("tensorboard", "wandb", "mlflow", "trackio"), FunctionName()),
            "names from tensorboard, wandb, mlflow, trackio, module:function or FILE.py:function",
            shown="('tensorboard', 'wandb')",
        ),
        "Destinations of metrics and pictures besides metrics.jsonl. Trackers are separate packages, configured by their "
        "environment variables.",
    ),
    "project": Setting("diffusion_jax", Text(), "Project in a tracker. The run is named after its directory."),
}

EMA: dict[str, Setting] = {
    "decay": Setting(0.9999, Number(minimum=0, maximum=1), "Decay rate of the parameters' moving average."),
    "warmup": Setting(False, Boolean(), "Whether the decay rate is min(decay, (1 + step) / (10 + step))."),
}

MESH: dict[str, Setting] = {
    "data": Setting(
        -1,
        OneOf(Choice(-1), Integer(1)),
        "Devices that split the batch; -1 for the number of devices divided by `mesh.fsdp`.",
    ),
    "fsdp": Setting(
        1, Integer(1), "Devices that split the batch and the state: parameters, optimizer, moving average."
    ),
    "device": Setting(
        None,
        optional(OneOf(Choice("a100", "h100"), Topology())),
        "GPU whose memory `--mode=plan` fits the settings to, or a TPU topology for which `--mode=plan` compiles.",
    ),
}

_SAMPLERS_ALONG_EPS = [
    name
    for name, make in sampling.SAMPLERS.items()
    if (stability := make().stability) is not None and stability.along_eps
]
# A setting sets the sampler argument with the same name.
SAMPLING: dict[str, Setting] = {
    "sampler": Setting(
        "ddpm",
        OneOf(Choice(*sampling.SAMPLERS), FunctionName()),
        "Algorithm that draws the samples, or a class derived from `sampling.Sampler`.",
    ),
    "steps": Setting(
        None,
        OneOf(
            Choice(None),
            Integer(1, MAX_TIMESTEPS),
            Tuple(OneOf(Integer(0), Number()), "at least 2 numbers", minimum_length=2, shown="(10, 15, 20)"),
        ),
        "Number of sampling steps; None for all timesteps. Several numbers are the steps per section of the chain "
        "with the spacing openai, or rising network times with the spacing given.",
    ),
    "spacing": Setting(
        None,
        optional(Choice(*schedules.SPACINGS, "given")),
        'Distribution of the steps over the timesteps, if `sampling.steps` is given; openai_ddim is OpenAI\'s "ddim50". '
        "None: trailing if alpha_bar ends at 0; otherwise log_snr for "
        f"{', '.join(_SAMPLERS_ALONG_EPS)}, for continuous data also with dpm_solver_pp and unipc of order 2 or more, and if "
        "the errors of an unclipped eps or score network would grow; trailing in all other cases.",
    ),
    "eta": Setting(
        0.0,
        Number(minimum=0, maximum=1),
        f"Noise of {', '.join(sampling.samplers_with('eta'))}: 0 is deterministic, 1 ancestral sampling.",
    ),
    "churn": Setting(
        0.0,
        Number(minimum=0),
        f"S_churn of {', '.join(sampling.samplers_with('churn'))}, noise that steps add; 0 for none.",
    ),
    "churn_range": Setting(
        (),
        Interval(Number(finite=False), "two rising numbers"),
        "Smallest and largest sigma / alpha at which churn adds noise; () for all.",
    ),
    "churn_noise": Setting(1.0, Number(minimum=0), "S_noise, a factor for the noise of churn."),
    "order": Setting(2, Choice(1, 2, 3), f"Order of {', '.join(sampling.samplers_with('order'))}."),
    "clip": Setting(
        None,
        OneOf(Boolean(), Choice("dynamic", None)),
        "Whether x_0 is clipped to [-1, 1] at every step; None: only for gray levels and `data.normalization=limits`. "
        "dynamic: x_0 is clipped to a quantile of |x_0|, at least 1, and divided by this quantile.",
    ),
    "clip_quantile": Setting(0.995, Number(above=0, maximum=1), "Quantile of the dynamic clipping."),
    "label": Setting(
        None,
        OneOf(
            Choice(None),
            Integer(0),
            Tuple(OneOf(Integer(0), Text()), "class numbers or names", 1, shown="(3, 5)"),
            Text(),
        ),
        "Class of the samples, by number or name, or several alternating classes; None for all classes. On the command line "
        "`--config.sampling.class` is an alias.",
    ),
    "guidance_scale": Setting(
        1.0,
        Number(),
        "Scale of classifier-free guidance, which needs `model.label_dropout` or `model.condition_dropout`: 1 for none, 0 "
        "for unconditional.",
    ),
    "guidance_interval": Setting(
        (),
        Interval(Number(finite=False), "two rising numbers"),
        "Network times at which guidance is applied; () for all.",
    ),
    "guidance_rescale": Setting(0.0, Number(minimum=0, maximum=1), "Share of guidance's contrast change to remove."),
    "classifier": Setting(
        "", PATH, "The guiding classifier's weights: a path or hf://OWNER/NAME, as for `pretrained.load`."
    ),
    "classifier_scale": Setting(1.0, Number(), "Scale of classifier guidance."),
    "classifier_form": Setting(
        "eps",
        Choice("eps", "mean"),
        "Quantity that the classifier shifts: the predicted noise, or the mean of ddpm (ADM).",
    ),
    "low_resolution": Setting(
        "", PATH, "Small images for an upsampler: an .npz from --mode=sample, or an image folder."
    ),
    "low_resolution_noise": Setting(
        0.0,
        Number(minimum=0),
        "Standard deviation of the noise on the small images, up to `diffusion.conditioning_noise`.",
    ),
    "conditions": Setting(
        "",
        PATH,
        'Conditions of the samples, in data units: an .npy, or an .npz with "condition" and optionally "condition_missing". '
        "Sample i uses row i modulo the number of rows.",
    ),
    "num_samples": Setting(64, Integer(1), "Number of samples that --mode=sample draws."),
    "batch_size": Setting(64, Integer(1), "Samples per batch."),
    "files": Setting(
        "npz", Choice("npz", "png"), "Files of --mode=sample: one .npz, or also a PNG for each image (png)."
    ),
    "seed": Setting(0, SEED, "Seed of the samples."),
    "use_ema": Setting(
        True,
        Boolean(),
        "Whether to use the parameters' moving average, once the initial weights are at most a tenth of the average.",
    ),
    "trajectory": Setting(
        0,
        OneOf(Choice(0), Integer(2)),
        "Columns in the picture that shows the first samples being denoised; 0 for no picture.",
    ),
    "preview_samples": Setting(
        16, Integer(0), "Samples in the pictures during training, drawn by DDIM; 0 for no pictures."
    ),
    "preview_steps": Setting(25, Integer(1, MAX_TIMESTEPS), "Sampling steps for the pictures during training."),
}

EDITING: dict[str, Setting] = {
    "task": Setting(
        "inpaint",
        Choice(*{**editing.EDITS, **editing.MEASUREMENTS}),
        "Task of --mode=edit, with the sampler in `sampling`. inpaint is RePaint without noise; replace is RePaint without "
        "resampling.",
    ),
    "image": Setting(
        "",
        PATH,
        "Image to edit, or the measurement: an image file, or an .npy in data units, for data that are not images and for "
        "measurements with noise.",
    ),
    "example": Setting(
        None,
        optional(Integer(0)),
        "Number of an example in `evaluation.split`, in place of `editing.image`. If the task has a measurement, the example "
        "is measured.",
    ),
    "noise": Setting(
        0.0,
        OneOf(
            Number(minimum=0),
            Tuple(Number(above=0), "numbers above 0", minimum_length=1, shown="(0.1, 0.2)"),
            PATH,
        ),
        "Standard deviation of the measurement's noise, in data units (images: gray levels of 0 to 255); 0 for none. Or a "
        "number for each channel, or an .npy with one for each number of the measurement, inf where nothing is measured, or "
        "with the covariance of all M numbers, [M, M], in squared data units.",
    ),
    "method": Setting(
        None,
        optional(Choice("mmps", "project", "repaint")),
        "How samples are drawn given the measurement: mmps with noise, project or repaint without noise. "
        "None: mmps with noise; without noise, repaint for inpaint and project for other tasks.",
    ),
    "covariance": Setting(
        None,
        optional(Choice("data", "jacobian")),
        "Covariance of x_0 in mmps: of the training data, or the network's Jacobian. None: data for a model that was trained "
        "on `data`, jacobian for published weights and for upsamplers.",
    ),
    "operator": Setting(
        "",
        OneOf(FunctionName(), PATH),
        "For the task linear, a function from examples [N, ...] in data units to measurements. For other tasks, an .npy: the "
        "kernel of deblur, the points [P, axes] of sparse (entries from 0), the bool frequencies of fourier, the angles of "
        'tomography in degrees; "" for a default by `editing.blur` or `editing.share`.',
    ),
    "blur": Setting(1.0, Number(above=0), "Standard deviation of deblur's Gaussian kernel, in entries."),
    "share": Setting(
        0.25,
        Number(above=0, maximum=1),
        "Share of the entries (sparse) or frequencies (fourier) that are measured, or ratio of angles to rows (tomography).",
    ),
    "iterations": Setting(
        None,
        optional(Integer(1)),
        "Largest number of solver iterations in mmps; None: 100 with the covariance of data, 3 with the Jacobian.",
    ),
    "mask": Setting("", PATH, "Mask: an image that is white, or a bool .npy that is True, at the known pixels."),
    "other": Setting("", PATH, "Second image or example for interpolate."),
    "num_samples": Setting(8, Integer(1), "Number of results; for interpolate, including both images."),
    "resamplings": Setting(10, Integer(1), "Resamplings for inpaint."),
    "jump": Setting(10, Integer(1), "Jump length for inpaint, in steps."),
    "strength": Setting(0.5, Number(above=0, maximum=1), "Strength of the changes by sdedit."),
    "factor": Setting(4, Integer(1), "Factor of super_resolution."),
    "level": Setting(
        None,
        optional(Integer(0)),
        "Step at which interpolate mixes the noised images; None mixes their encodings, for deterministic samplers.",
    ),
}

EVALUATION: dict[str, Setting] = {
    "split": Setting("test", Text(), "Split whose likelihood is measured."),
    "data_dir": Setting("", PATH, 'Directory of `evaluation.split`; "" for `data.data_dir`.'),
    "num_examples": Setting(
        0, Integer(0), "Number of examples to measure, starting with the first; 0 for all examples."
    ),
    "batch_size": Setting(64, Integer(1), "Examples measured per batch."),
    "strata": Setting(
        None,
        optional(Integer(1)),
        "Timestep strata for the bound. None visits every timestep for every example; S visits the first timestep and two "
        "in each of S strata.",
    ),
    "cdf": Setting(
        "exact", Choice(*likelihood.CDFS), "CDF of the discretized Gaussian; tanh is OpenAI's approximation."
    ),
    "clip": Setting(None, optional(Boolean()), "Whether x_0 is clipped to [-1, 1]; None: default of `sampling.clip`."),
    "seed": Setting(0, SEED, "Seed of the measurement noise."),
    "use_ema": Setting(True, Boolean(), "Whether the moving average is measured, as `sampling.use_ema` for samples."),
    "ode": Setting(False, Boolean(), "Whether to also measure the probability-flow ODE's likelihood."),
    "ode_dequantization": Setting(
        None,
        optional(Choice("uniform", "variational", "none")),
        "Dequantization for the ODE's likelihood; None: uniform for gray levels, none for continuous data.",
    ),
    "ode_trace": Setting(
        "hutchinson",
        Choice("hutchinson", "exact"),
        "Method for the ODE's divergence; exact computes as many derivatives as an example has values.",
    ),
    "ode_tolerance": Setting(1e-5, Number(above=0), "Error tolerance of the ODE solver."),
    "likelihood": Setting(True, Boolean(), "Whether --mode=evaluate measures the variational bound."),
    "num_samples": Setting(50_000, Integer(0), "Samples that --mode=evaluate compares with the data; 0 for none."),
    "features": Setting(
        "",
        OneOf(FunctionName(), Text()),
        'Feature extractor: inception, digits, or a function from examples to features; "": digits for the data set '
        "digits, none for data that are not images, otherwise inception.",
    ),
    "inception": Setting(
        "", PATH, 'File of Inception\'s weights, a .pth or the TensorFlow graph; "" for no metrics that need it.'
    ),
    "metrics": Setting(
        None,
        optional(
            Tuple(
                OneOf(Choice(*METRICS, "calibration"), FunctionName()),
                f"names from {', '.join(METRICS)}, calibration, module:function or FILE.py:function",
                minimum_length=1,
                shown="('fid',)",
            )
        ),
        "Metrics of samples. None for all metrics that suit the data: feature metrics for images, example metrics for other "
        "data, and both kinds for other data with `evaluation.features`.",
    ),
    "calibration_examples": Setting(
        100,
        Integer(10),
        "Examples of `evaluation.split` that the metric calibration measures, starting with the first.",
    ),
    "calibration_samples": Setting(
        19, Integer(2), "Samples for each calibration example; 19 or 99 for the coverage of 90% intervals."
    ),
    "quantities": Setting(
        ("means", "entries", "components"),
        Tuple(
            OneOf(Choice("means", "entries", "components"), FunctionName()),
            "names from means, entries, components, module:function or FILE.py:function",
            minimum_length=1,
            shown="('means',)",
        ),
        "Numbers of each example whose calibration is tested: the mean of each channel, values at four entries, components "
        "of the training data's covariance given the measurement, or a function from examples [N, ...] in data units to "
        "{name: numbers [N]}.",
    ),
    "reference_split": Setting("", Text(), 'Split that samples are compared with; "" for `data.split`.'),
    "every": Setting(0, Integer(0), "Training steps between two FID measurements, with few samples; 0 for none."),
    "every_samples": Setting(1000, Integer(2), "Samples for the FID during training."),
}

# Each group's description and settings, in the order of the reference page.
GROUPS: dict[str, tuple[str, dict[str, Setting]]] = {
    "": ("The run as a whole.", ROOT),
    "data": ("Training data.", DATA),
    "model": ("The network: its kind and the fields of `models.UNet`.", MODEL),
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


SETTINGS = {
    f"{group}.{name}" if group else name: setting
    for group, (_, settings) in GROUPS.items()
    for name, setting in settings.items()
}
# The defaults that differ for a classifier: ADM's classifier for ImageNet at 128x128 pixels.
CLASSIFIER_DEFAULTS = {f"model.{name}": value for name, value in CLASSIFIER_PRESETS["adm_classifier128"].items()}

_IDENTITY_GROUPS = ("data", "model", "diffusion", "optimizer", "ema")
_NOT_IDENTITY = ("data_dir", "download", "memory_mb", "disk_mb", "cache_decoded", "workers", "precision", "remat")
_NOT_IDENTITY += ("channel_names", "channel_units")


def is_identity(name: str) -> bool:
    """Whether a setting, group.setting, determines the numbers of a run, so that a relaunch must not change it."""
    group, _, last = name.rpartition(".")
    return name in ("seed", "training.batch_size") or (group in _IDENTITY_GROUPS and last not in _NOT_IDENTITY)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to {"group.setting": value}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" == "model.options":
            flat[f"{prefix}{key}"] = value.to_dict() if isinstance(value, ConfigDict) else value
        elif isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default of every setting by full name; `model` has other defaults for `diffusion.loss=classify`."""
    loss = flatten(config).get("diffusion.loss")
    is_classifier = isinstance(loss, str) and loss == "classify"
    return {name: setting.default for name, setting in SETTINGS.items()} | (
        CLASSIFIER_DEFAULTS if is_classifier else {}
    )


def identity_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that all launches of a run must agree on, as {"group.setting": value}.

    FILE.py:function is compared without the folder, so that a run can move.
    """
    found = {name: value for name, value in flatten(config).items() if name in SETTINGS and is_identity(name)}
    return {name: short_name(value) if isinstance(value, str) else value for name, value in found.items()}


def short_name(name: str) -> str:
    """Returns the name of a function, FILE.py:function, without the folder of the file; any other text is unchanged."""
    return name.rpartition("/")[2] if ".py:" in name else name


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a complete config trains a classifier on noisy images instead of a diffusion model."""
    return config["diffusion"]["loss"] == "classify"


def is_upsampler(config: Mapping[str, Any]) -> bool:
    """Whether a complete config describes an upsampler: a diffusion model whose network also takes small images."""
    return bool(config["data"]["low_resolution"])


def is_continuous(config: Mapping[str, Any]) -> bool:
    """Whether a complete config describes continuous data: float numbers without gray levels."""
    return config["data"]["levels"] is None


def sampler_setting(diffusion: Mapping[str, Any]) -> str:
    """Returns the setting that chooses the noise levels: "draw" if a path has a `draw`, else "timestep_sampler"."""
    return "draw" if diffusion["path"] and diffusion["draw"] != "uniform" else "timestep_sampler"


def clips_by_default(config: Mapping[str, Any]) -> bool:
    """Whether a complete config describes data in [-1, 1], so that the predicted x_0 is clipped."""
    return not is_continuous(config) or config["data"]["normalization"] == "limits"


def resolve_clip(config: Mapping[str, Any], group: str = "sampling") -> bool | str:
    """Returns the setting `clip` in a group of a complete config; None becomes the default for the data."""
    clip = config[group]["clip"]
    return clips_by_default(config) if clip is None else clip
