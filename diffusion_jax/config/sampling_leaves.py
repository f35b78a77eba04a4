"""The leaves for the use of a trained model: samples, edits and measurements."""

from __future__ import annotations

from typing import Any

from diffusion_jax import likelihood, schedules
from diffusion_jax.config.leaf import Leaf
from diffusion_jax.config.training_leaves import SEED
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
    optional,
)

__all__ = ["EDITING", "EVALUATION", "SAMPLING"]


class _Steps(OneOf):
    """A number of steps, several numbers, or None. Text is read as OpenAI's "ddim50" or "10,15,20" for the hint alone."""

    def hint(self, value: Any) -> str:
        if isinstance(value, int | str) and str(value) == "0":
            return "write None for all timesteps"
        if not isinstance(value, str):
            return super().hint(value)
        counts = value.removeprefix("ddim").replace(" ", "")
        spacing = "openai_ddim" if value.startswith("ddim") else "openai"
        if not all(count.isdecimal() for count in counts.split(",")):
            return ""
        return f"type --config.sampling.steps={counts} --config.sampling.spacing={spacing}"


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
            Tuple(OneOf(Integer(0), Text()), "class numbers or names", minimum_length=1, shown="(3, 5)"),
            Text(quotes=True),
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
        Text(path=True),
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
        "", Text(path=True), "Small images that an upsampler enlarges: an .npz of --mode=sample, or a folder of images."
    ),
    "low_resolution_noise": Leaf(
        0.0,
        Number(minimum=0),
        "Standard deviation of the noise on the small images, up to `diffusion.conditioning_noise`.",
    ),
    "conditions": Leaf(
        "",
        Text(path=True),
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
        Text(path=True),
        "File of the image to edit. For data that are not images, an .npy of one example [*spatial, C] in their units.",
    ),
    "mask": Leaf(
        "",
        Text(path=True),
        "File of the mask of inpaint and replace: an image that is white where pixels are known, or a bool .npy that is True "
        "where values are known.",
    ),
    "other": Leaf("", Text(path=True), "File of the second image or example of interpolate."),
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
        Text(path=True),
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
        Text(path=True),
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
                bare=True,
            )
        ),
        "Metrics of samples; None for all that suit the data. Images have those from fid to memorization, continuous data "
        "those from memorization to autocorrelation, and with their own `evaluation.features` also fid, kid, "
        "precision_recall and density_coverage. Use `evaluation.num_samples=0` for none.",
    ),
    "reference_split": Leaf("", Text(), 'Split that samples are compared with; "" for `data.split`.'),
    "every": Leaf(0, Integer(0), "Training steps between two measurements of the FID, of few samples; 0 for none."),
    "every_samples": Leaf(1000, Integer(2), "Samples of the FID during training."),
    "progressive_examples": Leaf(64, Integer(1), "Examples of --mode=progressive."),
    "progressive_columns": Leaf(12, Integer(2), "Columns of the pictures of --mode=progressive."),
}
