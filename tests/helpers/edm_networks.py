"""EDM's networks in float64 NumPy, from the description in Karras et al. 2022, appendix F: the shapes, and the outputs.

Activations are [N, C, H, W], and names are those in EDM's files. One class, `Network`, has both architectures.
"""

import numpy as np

from helpers.networks import silu

# The arguments of small networks, as in EDM's files.
_COMMON = {"img_resolution": 8, "img_channels": 3, "label_dim": 5, "augment_dim": 9, "label_dropout": 0.1}
_COMMON |= {"model_channels": 128, "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.1, "use_fp16": False}
ADM = _COMMON | {"model_type": "DhariwalUNet", "channel_mult": [1, 2], "sigma_data": 0.4}
DDPMPP = _COMMON | {"model_type": "SongUNet", "channel_mult": [2, 1], "embedding_type": "positional"}
DDPMPP |= {"encoder_type": "standard", "decoder_type": "standard", "channel_mult_noise": 1, "resample_filter": [1, 1]}
OF_NCSNPP = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
OF_NCSNPP |= {"resample_filter": [1, 3, 3, 1]}
NCSNPP = DDPMPP | OF_NCSNPP | {"channel_mult": [1, 2, 1]}


def convolve(x, weight, bias, more=0):
    """A convolution that keeps the size, or with padding for `more` pixels on each side."""
    size = weight.shape[-1]
    pad = size // 2 + more
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (2, 3))
    return np.moveaxis(np.tensordot(windows, weight, ((1, 4, 5), (1, 2, 3))), -1, 1) + bias[:, None, None]


def group_norm(x, scale, shift, epsilon):
    n, c = x.shape[:2]
    groups = x.reshape(n, min(32, c // 4), -1)
    groups = (groups - groups.mean(2, keepdims=True)) / np.sqrt(groups.var(2, keepdims=True) + epsilon)
    return groups.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]


def halve(x, taps, pad):
    """Every second pixel of x after a filter, whose center lies between pixels, with the square's sum of 1."""
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (len(taps), len(taps)), (2, 3))[:, :, ::2, ::2]
    return np.einsum("nchwij,i,j->nchw", windows, taps, taps) / np.sum(taps) ** 2


def double(x, taps, pad):
    """The transpose of `halve`, times 4: x with zeros between its pixels, filtered."""
    n, c, h, w = x.shape
    zeros = np.zeros((n, c, 2 * h + 2 * pad, 2 * w + 2 * pad))
    for i, row in enumerate(taps):
        for j, column in enumerate(taps):
            zeros[:, :, i : i + 2 * h : 2, j : j + 2 * w : 2] += x * row * column * 4 / np.sum(taps) ** 2
    return zeros[:, :, pad : pad + 2 * h, pad : pad + 2 * w]


class Network:
    """kind: "DhariwalUNet" (ADM) or "SongUNet" (DDPM++, NCSN++). arguments: as in EDM's files, all of them."""

    def __init__(self, kind, arguments):
        self.is_adm, self.arguments = kind == "DhariwalUNet", arguments
        self.is_ncsnpp = arguments.get("encoder_type") == "residual"
        self.taps = arguments.get("resample_filter", [1, 1])
        self.shapes, self.blocks = {}, {"enc": [], "dec": []}
        self._describe()

    def _linear(self, name, inputs, outputs, bias=True):
        self.shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            self.shapes[f"{name}.bias"] = (outputs,)

    def _convolution(self, name, inputs, outputs, size):
        self.shapes |= {f"{name}.weight": (outputs, inputs, size, size), f"{name}.bias": (outputs,)}

    def _norm(self, name, channels):
        self.shapes |= {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}

    def _block(self, half, name, inputs, outputs, attention=False, resample=None):
        self.blocks[half].append((name, inputs, attention, resample))
        full = f"{half}.{name}"
        self._norm(f"{full}.norm0", inputs)
        self._convolution(f"{full}.conv0", inputs, outputs, 3)
        self._linear(f"{full}.affine", self.arguments["model_channels"] * 4, outputs * (2 if self.is_adm else 1))
        self._norm(f"{full}.norm1", outputs)
        self._convolution(f"{full}.conv1", outputs, outputs, 3)
        if inputs != outputs or (resample and not self.is_adm):
            self._convolution(f"{full}.skip", inputs, outputs, 1)
        if resample:
            for part in ("conv0", "skip"):
                self.shapes[f"{full}.{part}.resample_filter"] = (1, 1, len(self.taps), len(self.taps))
        if attention:
            self._norm(f"{full}.norm2", outputs)
            self._convolution(f"{full}.qkv", outputs, 3 * outputs, 1)
            self._convolution(f"{full}.proj", outputs, outputs, 1)

    def _describe(self):
        a, width = self.arguments, self.arguments["model_channels"]
        waves = width * a.get("channel_mult_noise", 1)
        inner = width * 4 if self.is_adm else waves  # where labels are added
        if self.is_ncsnpp:
            self.shapes["map_noise.freqs"] = (waves // 2,)
        if a["label_dim"]:
            self._linear("map_label", a["label_dim"], inner, bias=not self.is_adm)
        if a["augment_dim"]:
            self._linear("map_augment", a["augment_dim"], waves, bias=False)
        self._linear("map_layer0", waves, 4 * width)
        self._linear("map_layer1", 4 * width, 4 * width)
        multipliers, last = a["channel_mult"], len(a["channel_mult"]) - 1
        current = width * multipliers[0] if self.is_adm else width
        widths, inputs = [current], a["img_channels"]
        self._convolution(f"enc.{a['img_resolution']}x{a['img_resolution']}_conv", a["img_channels"], current, 3)
        for level, multiplier in enumerate(multipliers):
            size = a["img_resolution"] >> level
            if level:
                self._block("enc", f"{size}x{size}_down", current, current, resample=halve)
                widths.append(current)
                if self.is_ncsnpp:
                    name = f"{size}x{size}_aux_residual"
                    self._convolution(f"enc.{name}", inputs, current, 3)
                    self.shapes[f"enc.{name}.resample_filter"] = (1, 1, 4, 4)
                    self.blocks["enc"].append((name, inputs, False, None))
                    inputs = current
            for i in range(a["num_blocks"]):
                attention = size in a["attn_resolutions"]
                self._block("enc", f"{size}x{size}_block{i}", current, current := width * multiplier, attention)
                widths.append(current)
        for level in range(last, -1, -1):
            size = a["img_resolution"] >> level
            if level == last:
                self._block("dec", f"{size}x{size}_in0", current, current, attention=True)
                self._block("dec", f"{size}x{size}_in1", current, current)
            else:
                self._block("dec", f"{size}x{size}_up", current, current, resample=double)
            for i in range(a["num_blocks"] + 1):
                attention = size in a["attn_resolutions"] and (self.is_adm or i == a["num_blocks"])
                inputs, current = current + widths.pop(), width * multipliers[level]
                self._block("dec", f"{size}x{size}_block{i}", inputs, current, attention)
        size = f"{a['img_resolution']}x{a['img_resolution']}"
        self.out = ("out_norm", "out_conv") if self.is_adm else (f"dec.{size}_aux_norm", f"dec.{size}_aux_conv")
        self._norm(self.out[0], current)
        self._convolution(self.out[1], current, a["img_channels"], 3)

    def draw(self, seed=0):
        """Random weights, float32, of a scale that keeps activations near 1."""
        generator, weights = np.random.default_rng(seed), {}
        for name, shape in self.shapes.items():
            fan_in = np.prod(shape[1:]) if len(shape) > 1 else 25
            weights[name] = (generator.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
            if "norm" in name and name.endswith("weight"):
                weights[name] += 1
            if name.endswith("resample_filter"):
                weights[name] = np.float32(np.outer(self.taps, self.taps) / np.sum(self.taps) ** 2).reshape(shape)
            if name.endswith("freqs"):
                weights[name] = np.float32(16 * generator.standard_normal(shape))
        return weights

    def __call__(self, weights, x, noise_label, labels=None):
        """x: [N, C, H, W]; noise_label: [N]; labels: int [N]. Returns the output of the network, before EDM's scaling."""
        self.weights, a = {name: np.asarray(value, np.float64) for name, value in weights.items()}, self.arguments
        half = a["model_channels"] // 2
        if self.is_ncsnpp:  # float32, because a rounding error in angles of several hundred is large in their sines
            angles = np.float32(noise_label)[:, None] * (np.float32(2 * np.pi) * weights["map_noise.freqs"])
        else:
            frequencies = 10000.0 ** (-np.arange(half) / (half if self.is_adm else half - 1))
            angles = np.asarray(noise_label, np.float64)[:, None] * frequencies
        angles = np.float64(angles)
        waves = (np.cos(angles), np.sin(angles)) if self.is_adm else (np.sin(angles), np.cos(angles))
        embedding = np.concatenate(waves, axis=1)
        if not self.is_adm and a["label_dim"]:
            onehot = np.zeros((len(x), a["label_dim"]))
            if labels is not None:
                onehot[np.arange(len(x)), labels] = np.sqrt(a["label_dim"])
            embedding = embedding + self._apply_linear("map_label", onehot)
        embedding = self._apply_linear("map_layer1", silu(self._apply_linear("map_layer0", embedding)))
        if self.is_adm and labels is not None:
            embedding = embedding + self.weights["map_label.weight"].T[labels]
        embedding = silu(embedding)
        size = a["img_resolution"]
        inputs = np.asarray(x, np.float64)
        x = self._apply_convolution(f"enc.{size}x{size}_conv", inputs)
        skips = [x]
        for name, _, attention, resample in self.blocks["enc"]:
            if name.endswith("aux_residual"):
                weight, bias = (self.weights[f"enc.{name}.{part}"] for part in ("weight", "bias"))
                x = inputs = skips[-1] = (x + halve(convolve(inputs, weight, bias, 1), self.taps, 0)) / np.sqrt(2)
                continue
            x = self._apply_block(f"enc.{name}", x, embedding, attention, resample)
            skips.append(x)
        for name, inputs, attention, resample in self.blocks["dec"]:
            if x.shape[1] != inputs:
                x = np.concatenate([x, skips.pop()], axis=1)
            x = self._apply_block(f"dec.{name}", x, embedding, attention, resample)
        return self._apply_convolution(self.out[1], silu(self._apply_norm(self.out[0], x)))

    def _apply_linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def _apply_convolution(self, name, x):
        return convolve(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _apply_norm(self, name, x):
        epsilon = 1e-5 if self.is_adm else 1e-6
        return group_norm(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], epsilon)

    def _apply_block(self, name, x, embedding, attention, resample):
        scale = 1 if self.is_adm else np.sqrt(0.5)
        h, skip = silu(self._apply_norm(f"{name}.norm0", x)), x
        if resample:
            h, skip = (resample(part, self.taps, len(self.taps) // 2 - 1) for part in (h, skip))
        h = self._apply_convolution(f"{name}.conv0", h)
        time = self._apply_linear(f"{name}.affine", embedding)[:, :, None, None]
        if self.is_adm:
            factor, shift = np.split(time, 2, axis=1)
            h = silu(self._apply_norm(f"{name}.norm1", h) * (1 + factor) + shift)
        else:
            h = silu(self._apply_norm(f"{name}.norm1", h + time))
        h = self._apply_convolution(f"{name}.conv1", h)
        if f"{name}.skip.weight" in self.weights:
            skip = self._apply_convolution(f"{name}.skip", skip)
        x = (skip + h) * scale
        return self._attend(name, x) * scale if attention else x

    def _attend(self, name, x):
        n, c, height, width = x.shape
        heads = c // 64 if self.is_adm else 1
        rows = self._apply_convolution(f"{name}.qkv", self._apply_norm(f"{name}.norm2", x))
        q, k, v = np.moveaxis(rows.reshape(n, heads, c // heads, 3, height * width), 3, 0)
        scores = np.einsum("nhcq,nhck->nhqk", q, k) / np.sqrt(c // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nhqk,nhck->nhcq", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
        return x + self._apply_convolution(f"{name}.proj", mixed)
