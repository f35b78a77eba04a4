"""The leaves that describe a training run: data, network, diffusion process, optimization and devices."""

from __future__ import annotations

import dataclasses
import functools

from diffusion_jax import losses, process, schedules, timesteps
from diffusion_jax.config.leaf import Leaf
from diffusion_jax.config.values import (
    Boolean,
    Choice,
    ChoiceOrNone,
    DType,
    Integer,
    Interval,
    Number,
    OneOf,
    Text,
    Tuple,
    optional,
)

__all__ = [
    "CLASSIFIER_MODEL",
    "DATA",
    "DIFFUSION",
    "EMA",
    "LOGGING",
    "MESH",
    "MODEL",
    "OPTIMIZER",
    "ROOT",
    "SEED",
    "TRAINING",
]

_IdentityLeaf = functools.partial(Leaf, identity=True)
SEED = Integer(0, 2**32 - 1)

ROOT: dict[str, Leaf] = {
    "seed": _IdentityLeaf(0, SEED, "Seed of the initial parameters, the batches and the noise of training."),
    "init_from": Leaf(
        "", Text(path=True), 'Path of weights that training starts from, as `pretrained.load` takes it; "" for none.'
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
        "", Text(path=True), 'Directory of TFDS ("" for ~/tensorflow_datasets), folder of images, or file of arrays.'
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
        Tuple(OneOf(Integer(1), Number(above=0)), "positive numbers", minimum_length=1, shown="(1, 2, 2)", bare=True),
        "Width of each resolution, as a multiple of `model.channels`. Each resolution halves the height and width.",
    ),
    "num_res_blocks": _IdentityLeaf(2, Integer(1), "Residual blocks at each resolution (one more in the decoder)."),
    "attention_levels": _IdentityLeaf(
        (1,),
        Tuple(Integer(0), "whole numbers of at least 0", shown="(1,), or () for none", bare=True),
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
        Tuple(Integer(0), "whole numbers", length=2, shown="(0, 1)"),
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
        DType("float32", "bfloat16"),
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

# The defaults of models.Classifier (ADM's classifier of ImageNet at 128x128 pixels) that differ from those of the U-Net.
_CLASSIFIER_DEFAULTS = {
    "channel_multipliers": (1, 1, 2, 3, 4),
    "attention_levels": (2, 3, 4),
    "head_channels": 64,
    "resample_blocks": True,
    "scale_shift_norm": True,
    "embedding_cos_first": True,
    "embedding_freq_shift": 0.0,
    "downsample_padding": (1, 1),
    "norm_epsilon": 1e-5,
    "initializer": "openai",
    "dropout": 0.0,
}
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
        "none", ChoiceOrNone("none", *losses.WEIGHTINGS), "Weight of each timestep in the simple loss."
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
            bare=True,
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
