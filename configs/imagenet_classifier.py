"""ADM's noise-aware ImageNet classifiers (Dhariwal & Nichol 2021, section 4), for guidance, at 64, 128, 256 or 512 pixels.

    python main.py --config=configs/imagenet_classifier.py --workdir=DIR --mode=train_classifier
    python main.py --config=configs/imagenet_classifier.py:256 --workdir=DIR --mode=train_classifier

| pixels | parameters |
|---|---|
| 64 | 65,438,568 |
| 128 (where no size is named) | 42,568,040 |
| 256 | 54,096,360 |
| 512 | 54,448,360 |

300,000 steps of batch 256, as published for 128 pixels. Published results of guidance with them: FID 2.07, 2.97, 4.59 and
7.72. Where it differs: images are resized and cropped in the middle, not at random. Expected, not measured: days on one
current GPU. Needs the TFDS set imagenet2012, whose files TFDS asks you to download by hand; 64 pixels use
imagenet_resized/64x64, which TFDS downloads.
"""

from ml_collections import ConfigDict

from configs import default
from diffusion_jax import models


def get_config(size: str = "128") -> ConfigDict:
    """size: "64", "128", "256" or "512"."""
    if size not in ("64", "128", "256", "512"):
        raise ValueError(f"imagenet_classifier.py:{size}: known are 64, 128, 256, 512")
    config = default.get_config()
    config.data.update(dataset="imagenet2012", image_size=int(size))
    config.model = classifier(1000)
    config.model.update(models.preset_fields(f"adm_classifier{size}"))
    if size == "64":
        config.data.dataset = "imagenet_resized/64x64"
        config.diffusion.schedule = "cosine"  # as imagenet64_adm.py, which it guides
    config.diffusion.loss = "classify"
    config.training.update(num_steps=300_000, batch_size=256, checkpoint_every=10_000)
    config.optimizer.update(name="adamw", learning_rate=3e-4, warmup_steps=0, weight_decay=0.05, grad_clip=0.0)
    config.optimizer.update(schedule="linear", decay_steps=300_000)
    config.ema.decay = 0.0  # it is used as it is
    return config


def classifier(num_classes: int) -> ConfigDict:
    """The fields of models.Classifier, as ADM's at 128 pixels; what they mean is said in configs/default.py."""
    model = ConfigDict()
    model.channels = 128
    model.channel_multipliers = (1, 1, 2, 3, 4)
    model.num_res_blocks = 2
    model.attention_levels = (2, 3, 4)
    model.num_heads = 1
    model.head_channels = 64
    model.resample_blocks = True
    model.scale_shift_norm = True
    model.embedding_cos_first = True
    model.embedding_freq_shift = 0.0
    model.downsample_padding = (1, 1)
    model.num_groups = 32
    model.norm_epsilon = 1e-5
    model.initializer = "openai"
    model.dropout = 0.0
    model.num_classes = num_classes
    model.dtype = "float32"
    model.remat = False
    return model
