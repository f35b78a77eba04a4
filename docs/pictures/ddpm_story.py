"""Draws the pictures for docs/concepts/ddpm.md: `python docs/pictures/ddpm_story.py` writes docs/images/ddpm_*.

All numbers are exact for the data of each picture: the training digits as a finite set, or a mixture of two Gaussians in one
dimension. The denoisers are closed forms, so no network is trained. Takes less than a minute on two CPU cores.
"""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from diffusion_jax import Denoiser, likelihood, process, sampling, schedules
from diffusion_jax.data import Digits
from diffusion_jax.pictures.grids import to_array

IMAGES = pathlib.Path(__file__).parent.parent / "images"
WIDTH = 5.2  # inches: letters are readable when a phone scales the picture to 360 pixels
SCHEDULE = schedules.from_betas(schedules.betas("linear", 1000))
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#7B3294", "0.45"
# The mixture of two Gaussians: the two-mode density in all one-dimensional pictures.
MEANS, VARIANCES, WEIGHTS = np.array([-1.1, 0.9]), np.array([0.05, 0.1]), np.array([0.4, 0.6])
GRID = np.linspace(-7, 7, 2801)
PLAYS, SECONDS_PER_FRAME, PAUSE = 3, 0.12, 1.5


def normal(x, mean, variance):
    """Returns the density of N(mean, variance) at x."""
    return np.exp(-0.5 * (x - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


def log_density(x, alpha_bar):
    """Returns log q(x_t) of the mixture; alpha_bar = 1 gives the data."""
    spread = alpha_bar * VARIANCES + 1 - alpha_bar
    away = x[..., None] - math.sqrt(alpha_bar) * MEANS
    return np.logaddexp.reduce(np.log(WEIGHTS) - 0.5 * (away**2 / spread + np.log(2 * np.pi * spread)), axis=-1)


def exact_eps(x_t, time):
    """Returns E[eps | x_t] of the mixture, the output of a perfect network, for x_t [B, 1]."""
    alpha, sigma, *_ = SCHEDULE.path.at(time, x_t)
    spread = alpha**2 * VARIANCES + sigma**2
    away = x_t - alpha * MEANS
    weights = jax.nn.softmax(np.log(WEIGHTS) - 0.5 * (away**2 / spread + jnp.log(spread)), axis=-1)
    return sigma * (weights * away / spread).sum(axis=-1, keepdims=True)


def draw_data(count: int) -> np.ndarray:
    """Draws from the mixture; [count, 1]."""
    rng = np.random.default_rng(0)
    mode = rng.choice(2, count, p=WEIGHTS)
    return (MEANS[mode] + np.sqrt(VARIANCES[mode]) * rng.standard_normal(count))[:, None]


def noising() -> Figure:
    """Two digits at increasing noise, and the mean of the clean digits that could have become each noisy digit."""
    images = Digits("train", (8, 8), 1).arrays["image"].astype(np.float64) / 127.5 - 1
    steps = [0, 60, 200, 350, 550, 999]
    figure = Figure((WIDTH, 4.1))
    # The third row is an empty gap between the digits.
    grid = figure.add_gridspec(5, len(steps), height_ratios=[1, 1, 0.15, 1, 1], wspace=0.05, hspace=0.05)
    panels = np.array([[figure.add_subplot(grid[row, column]) for column in range(len(steps))] for row in (0, 1, 3, 4)])
    figure.subplots_adjust(left=0.19, right=0.995, top=0.82, bottom=0.01)
    figure.suptitle("Two digits under noise, and the best guess of each", y=0.985)
    for digit, rows in zip((3, 8), (panels[:2], panels[2:]), strict=True):
        eps = np.random.default_rng(digit).standard_normal((8, 8, 1))
        for column, t in enumerate(steps):
            x_t = np.asarray(process.q_sample(SCHEDULE, images[digit], t, eps))
            mean, variance = process.q_mean_variance(SCHEDULE, images, t)
            log_weights = -0.5 * np.sum((x_t - mean) ** 2 / variance, axis=(1, 2, 3))
            best = np.tensordot(jax.nn.softmax(log_weights), images, axes=1)
            for panel, image in zip(rows[:, column], (x_t, best), strict=True):
                panel.imshow(image[..., 0], cmap="gray", vmin=-1, vmax=1)
                panel.set(xticks=[], yticks=[])
    for column, t in enumerate(steps):
        snr = np.format_float_positional(SCHEDULE.snr[t], precision=2 if t < 999 else 1, fractional=False, trim="-")
        panels[0, column].set_title(f"{t}\n{snr}", fontsize=9.5)
    heading = {"xycoords": "axes fraction", "ha": "right", "va": "bottom", "fontsize": 9.5}
    panels[0, 0].annotate("index t\nSNR", (-0.1, 1.065), **heading)
    for row, label in enumerate(["noisy\n$x_t$", "best guess\nof $x_0$"] * 2):
        panels[row, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    return figure


def noise_schedules() -> Figure:
    """alpha_bar and the log SNR of four schedules."""
    figure = Figure((WIDTH, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    styles = {"linear": (BLUE, "-"), "cosine": (ORANGE, "--"), "quadratic": (GREEN, "-."), "sigmoid": (PURPLE, ":")}
    for name, (color, line) in styles.items():
        schedule = schedules.from_betas(schedules.betas(name, 1000))
        top.plot(schedule.timesteps, schedule.alpha_bar, color=color, linestyle=line, linewidth=2, label=name)
        bottom.plot(schedule.timesteps, np.log(schedule.snr), color=color, linestyle=line, linewidth=2)
    top.set(title="How much signal is left after t steps", ylabel=r"$\bar\alpha_t$, share of the signal")
    top.legend(handlelength=3)
    bottom.set(xlabel="index t", ylabel="log SNR", ylim=(-16, 11))
    bottom.axhline(0, color=GRAY, linewidth=0.8)
    bottom.text(0, -0.4, "signal = noise", color=GRAY, va="top", fontsize=9.5)
    return figure


def posterior() -> Figure:
    """The two factors of q(x_{t-1} | x_t, x_0) and their product, in one dimension, for a large step."""
    schedule = schedules.respace(SCHEDULE, 8, "trailing")
    t, x_0, x_t = 3, 1.0, -0.6
    mean, variance = (float(value[0]) for value in process.q_mean_variance(schedule, np.array([x_0]), t - 1))
    beta = schedule.betas[t]
    product = process.q_posterior(schedule, np.array([x_0]), np.array([x_t]), t)
    # As a function of x_{t-1}, q(x_t | x_{t-1}) is a Gaussian around x_t / sqrt(alpha_t).
    curves = [
        (r"$q(x_{t-1} \mid x_0)$: from the clean $x_0$", mean, variance, BLUE, "--"),
        (r"$q(x_t \mid x_{t-1})$: from the noisy $x_t$", x_t / math.sqrt(1 - beta), beta / (1 - beta), ORANGE, "-."),
        (r"product: $q(x_{t-1} \mid x_t, x_0)$", float(product.mean[0]), float(product.variance[0]), "black", "-"),
    ]
    x = np.linspace(-3.2, 3.2, 641)
    densities = [normal(x, *curve[1:3]) for curve in curves]
    by_bayes = densities[0] * densities[1]
    np.testing.assert_allclose(densities[2], by_bayes / np.trapezoid(by_bayes, x), atol=1e-3)
    figure = Figure((WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, _, _, color, line), density in zip(curves, densities, strict=True):
        axes.plot(x, density, color=color, linestyle=line, linewidth=2, label=label)
    axes.fill_between(x, densities[2], color="0.88")
    for value, name in ((x_0, "$x_0$"), (x_t, "$x_t$")):
        axes.plot([value], [0], marker="^", markersize=9, color=GRAY, clip_on=False, zorder=3)
        axes.annotate(name, (value, 0), xytext=(0, 9), textcoords="offset points", ha="center")
    axes.set(
        title="The step back, if $x_0$ is known", xlabel="$x_{t-1}$", ylabel="density", ylim=(0, 0.9), xlim=(-3, 3)
    )
    axes.legend(loc="upper left", handlelength=3)
    return figure


def bound_terms() -> Figure:
    """The exact terms of the bound, and the errors of eps, for the mixture and a perfect network."""
    steps = np.arange(SCHEDULE.num_timesteps)
    perfect = jax.jit(exact_eps)
    errors = []  # E Var(eps | x_t) at each step
    for t in steps:
        alpha_bar = SCHEDULE.alpha_bar[t]
        eps = np.asarray(perfect(GRID[:, None], np.full(GRID.size, float(t))))[:, 0]
        # By the law of total variance, Var(eps) = 1 is Var(E[eps | x_t]) + E Var(eps | x_t); eps has mean 0.
        errors.append(1 - np.trapezoid(np.exp(log_density(GRID, alpha_bar)) * eps**2, GRID))
    errors = np.array(errors)
    x_0_errors = errors * (1 - SCHEDULE.alpha_bar) / SCHEDULE.alpha_bar
    # The mean of the KL over x_0 and x_t, because the KL is linear in the squared difference of the means.
    transitions = SCHEDULE.transitions
    gap, log_variance = transitions.posterior_mean_coef_x_0 * np.sqrt(x_0_errors), transitions.posterior_log_variance
    terms = likelihood.gaussian_kl(gap, log_variance, 0.0, np.log(transitions.fixed_large_variance))
    terms = np.asarray(terms) / math.log(2)
    x_0 = draw_data(4000)
    denoiser = Denoiser(exact_eps, clip=False)
    drawn = likelihood.bits_per_dim(jax.random.key(0), SCHEDULE, denoiser, x_0, gray_levels=None)
    data = log_density(GRID, 1.0)
    entropy = -np.trapezoid(np.exp(data) * data, GRID) / math.log(2)
    # L_0 is -E log N(x_0; E[x_0 | x_1], sigma^2).
    variance = transitions.fixed_large_variance[0]
    decoder = 0.5 * (math.log(2 * math.pi * variance) + x_0_errors[0] / variance) / math.log(2)
    second_moment = np.trapezoid(np.exp(data) * GRID**2, GRID)
    last = SCHEDULE.alpha_bar[-1]
    prior = 0.5 * (last * second_moment - last - math.log1p(-last)) / math.log(2)
    print(
        f"bound {prior + decoder + terms[1:].sum():.3f} = prior {prior:.1e} + decoder {decoder:.3f} + transitions ",
        end="",
    )
    print(f"{terms[1:].sum():.3f} bits; drawn {drawn.total.mean():.3f}; entropy {entropy:.3f} bits")
    posterior_variance = np.exp(log_variance)
    best = 0.5 * np.log1p(gap[1:] ** 2 / posterior_variance[1:]).sum() / math.log(2)
    best += 0.5 * math.log(2 * math.pi * math.e * x_0_errors[0]) / math.log(2)
    print(f"bound with the best variance at each step: {prior + best:.3f} bits")
    print(f"the first 100 transitions: {terms[1:101].sum() / terms[1:].sum():.0%} of the sum")

    figure = Figure((WIDTH, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(steps[1:], terms[1:], color=BLUE, linewidth=2, label="exact")
    shown = np.unique(np.geomspace(1, 999, 25).astype(int))
    marks = {"color": ORANGE, "linestyle": "", "marker": "o", "markersize": 4.5}
    top.plot(shown, np.asarray(drawn.vlb.mean(axis=0))[shown], label="mean of 4,000 draws", **marks)
    top.set(title="A perfect network: terms of the bound", ylabel="term at index t (bits)", yscale="log")
    top.legend()
    bottom.plot(steps, errors, color=BLUE, linewidth=2)
    bottom.plot(shown, np.asarray(drawn.mse.mean(axis=0))[shown], **marks)
    bottom.set(title="The same network: squared error of eps", xlabel="index t (log scale)", xscale="log")
    bottom.set(ylabel="mean squared error", ylim=(0, 1.05))
    return figure


def sample_paths(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns samples after `kept` numbers of steps, [K, N] forward from the data and [K, N] backward from noise."""
    x_0 = jnp.asarray(draw_data(20_000))

    def step(x_prev, t):
        eps = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), x_prev.shape, x_prev.dtype)
        x_t = process.q_step(SCHEDULE, x_prev, t, eps)
        return x_t, x_t

    _, x_t = jax.lax.scan(step, x_0, jnp.arange(SCHEDULE.num_timesteps))
    forward = jnp.concatenate([x_0[None], x_t])[kept]
    x_T = jax.random.normal(jax.random.key(2), x_0.shape, x_0.dtype)
    denoiser, frames = Denoiser(exact_eps, clip=False), kept[1:] - 1
    x, trajectory = sampling.sample(jax.random.key(3), SCHEDULE, denoiser, x_T, sampling.ddpm(), trajectory=frames)
    backward = jnp.concatenate([trajectory.x_t, x[None]])[::-1]
    return np.asarray(forward[..., 0]), np.asarray(backward[..., 0])


def draw_frame(samples: np.ndarray, kept: np.ndarray, now: int, is_forward: bool) -> Figure:
    """Draws the samples [K, N] after kept[now] steps, above the ways of some samples until then."""
    figure = Figure((WIDTH, 5.4))
    top, bottom = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(left=0.155, right=0.97, top=0.87, bottom=0.1, hspace=0.1)
    heading = "Forward: each step adds noise" if is_forward else "Reverse: each step removes noise"
    figure.suptitle(f"{heading}\n$x_t$ at {kept[now]:,} of 1,000 noise steps", y=0.975)
    x = np.linspace(-3.5, 3.5, 281)
    alpha_bars = np.append(1.0, SCHEDULE.alpha_bar)
    top.hist(samples[now], np.linspace(-3.5, 3.5, 71), density=True, color="0.75", label="20,000 samples")
    top.plot(x, np.exp(log_density(x, alpha_bars[kept[now]])), color=BLUE, linewidth=2, label="exact density")
    top.set(xlim=(-3.5, 3.5), ylim=(0, 1.0), ylabel="density of $x_t$")
    top.legend(loc="upper center", ncols=2)
    steps = np.arange(0, 1001, 10)
    densities = np.exp([log_density(x, alpha_bars[t]) for t in steps])
    bottom.imshow(np.sqrt(densities), cmap="Greys", vmax=2.2, extent=(-3.5, 3.5, 1005, -5), aspect="auto")
    seen = slice(0, now + 1) if is_forward else slice(now, None)
    for path in range(6):
        color = f"C{path}"
        bottom.plot(samples[seen, path], kept[seen], color=color, linewidth=1.3)
        bottom.plot(samples[now, path], kept[now], color=color, marker="o^sDvP"[path], markersize=7, clip_on=False)
    bottom.set(ylim=(1000, 0), xlabel="$x_t$ (gray: density)", ylabel="noise steps so far")
    return figure


def animate() -> None:
    """Writes the animation: the data become noise, and noise becomes data."""
    kept = np.round(1000 * np.linspace(0, 1, 26) ** 1.4).astype(int)
    forward, backward = sample_paths(kept)
    last = len(kept) - 1
    frames = [draw_frame(forward, kept, now, True) for now in range(last + 1)]
    frames += [draw_frame(backward, kept, now, False) for now in range(last, -1, -1)]
    for figure in frames:
        figure.set_dpi(125)
    images = [Image.fromarray(to_array(figure)) for figure in frames]
    palette = images[last].quantize(128)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    background = 3 * images[0].getpixel((0, 0))
    colors = palette.getpalette()
    colors[background : background + 3] = [255, 255, 255]  # the palette has a light gray instead of white
    for image in images:
        image.putpalette(colors)
    durations = [PAUSE if now in (0, last, last + 1, 2 * last + 1) else SECONDS_PER_FRAME for now in range(len(images))]
    # The default image, for programs that show no animation, is the last frame.
    images[-1].save(
        IMAGES / "ddpm_forward_reverse.png",
        save_all=True,
        append_images=images,
        default_image=True,
        duration=[1000 * seconds for seconds in durations],
        loop=PLAYS,
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    matplotlib.rcParams.update({"font.size": 10.5, "axes.titlesize": 11.5, "figure.titlesize": 11.5})
    for draw, suffix in ((noising, "png"), (noise_schedules, "svg"), (posterior, "svg"), (bound_terms, "svg")):
        draw().savefig(IMAGES / f"ddpm_{draw.__name__}.{suffix}", dpi=250, facecolor="white")
    animate()
