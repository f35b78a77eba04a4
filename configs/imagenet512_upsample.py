"""ADM's upsampler of ImageNet from 128x128 to 512x512 (Dhariwal & Nichol 2021, section 5.3): 308,835,270 parameters.

    python main.py --config=configs/imagenet512_upsample.py --workdir=DIR

Published result, from the guided samples of the model at 128 pixels: FID 3.85. As imagenet256_upsample.py otherwise.
"""

from diffusion_jax.config import ConfigDict, default, experiment, preset_fields


def get_config() -> ConfigDict:
    """Six levels from 512 to 16 pixels, attention at 32 and 16, 64 channels a head."""
    config = experiment("imagenet256_upsample")
    config.data.update(image_size=512, low_resolution=128)
    config.model = default().model
    config.model.update(preset_fields("adm_upsampler_128_512"))
    config.sampling.update(num_samples=4, batch_size=4)
    return config
