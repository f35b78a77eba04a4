"""Weights as other projects publish them: stored networks, files and folders, and the published flags."""

import json
import re

import numpy as np
import safetensors.numpy

from helpers.paths import FIXTURES

SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "variance_type": "fixed_large"}
LEARNED = {**SCHEDULER, "variance_type": "learned_range"}
NARROW_FLAGS = "--image_size 64 --num_head_channels 16 --use_new_attention_order False "
NARROW_FLAGS += "--diffusion_steps 1000 --noise_schedule linear"
CLASSIFIER_FLAGS = {"image_size": 8, "classifier_depth": 1, "diffusion_steps": 1000, "noise_schedule": "cosine"}
README = {  # OpenAI's documented flags, by network
    "improved_imagenet64": "--image_size 64 --num_channels 128 --num_res_blocks 3 --learn_sigma True --num_heads 4 "
    "--diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True",
    "improved_cifar10": "--image_size 32 --num_channels 128 --num_res_blocks 3 --learn_sigma True --dropout 0.3 "
    "--num_heads 4 --diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True",
    "improved_imagenet64_conditional": "--image_size 64 --num_channels 192 --num_res_blocks 3 --learn_sigma True "
    "--class_cond True --num_heads 4 --diffusion_steps 4000 --noise_schedule cosine --rescale_learned_sigmas False "
    "--rescale_timesteps False",
    "improved_upsampler_64_256": "--num_channels 192 --num_res_blocks 2 --learn_sigma True --class_cond True --num_heads 4 "
    "--large_size 256 --small_size 64 --diffusion_steps 4000 --noise_schedule linear --rescale_timesteps False",
    "improved_lsun": "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear",
    "adm_imagenet64": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 "
    "--image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 "
    "--num_res_blocks 3 --resblock_updown True --use_new_attention_order True --use_fp16 True --use_scale_shift_norm True",
    "adm_imagenet128": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 128 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm_imagenet256": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm_imagenet256_unconditional": "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 "
    "--image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm_imagenet512": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --image_size 512 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 False --use_scale_shift_norm True",
    "adm_lsun": "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256 "
    "--learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm_upsampler_64_256": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --large_size 256 "
    "--small_size 64 --learn_sigma True --noise_schedule linear --num_channels 192 --num_heads 4 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm_upsampler_128_512": "--attention_resolutions 32,16 --class_cond True --diffusion_steps 1000 --large_size 512 "
    "--small_size 128 --learn_sigma True --noise_schedule linear --num_channels 192 --num_head_channels 64 "
    "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True",
    "adm_classifier64": "--image_size 64 --classifier_depth 4 --diffusion_steps 1000 --noise_schedule cosine",
    "adm_classifier128": "--image_size 128 --classifier_attention_resolutions 32,16,8 --classifier_depth 2 "
    "--classifier_width 128 --classifier_pool attention --classifier_resblock_updown True "
    "--classifier_use_scale_shift_norm True --diffusion_steps 1000 --noise_schedule linear",
    "adm_classifier256": "--image_size 256 --classifier_depth 2 --diffusion_steps 1000 --noise_schedule linear",
    "adm_classifier512": "--image_size 512 --classifier_depth 2 --diffusion_steps 1000 --noise_schedule linear",
}


def worst(ours, theirs):
    """The largest difference over the largest value."""
    return abs(np.asarray(ours) - theirs).max() / abs(theirs).max()


def stored(name):
    """(weights, inputs and output) of a fixture."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        arrays = dict(arrays)
    weights = {key.removeprefix("weights/"): arrays.pop(key) for key in list(arrays) if key.startswith("weights/")}
    return {key: value.astype(np.float32) for key, value in weights.items()}, arrays


def write_folder(directory, config, weights, scheduler=SCHEDULER):
    """Writes a pipeline folder as diffusers does; with six channels, the variance is learned."""
    if scheduler is SCHEDULER and weights["conv_out.bias"].shape == (6,):
        scheduler = LEARNED
    (directory / "unet").mkdir(parents=True)
    (directory / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}))
    safetensors.numpy.save_file(weights, directory / "unet" / "diffusion_pytorch_model.safetensors")
    if scheduler:
        (directory / "scheduler").mkdir()
        (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return directory


def write(path, weights):
    safetensors.numpy.save_file(weights, path)
    return path


def ho_variables(weights):
    """Converts the port's names and layouts to Ho et al.'s variables, independently of the code under test."""
    variables = {}
    for name, value in weights.items():
        layer, leaf = name.rsplit(".", 1)
        layer = re.sub(r"\b(down|up|block|attn)\.(\d+)", r"\1_\2", layer)
        layer = layer.replace("temb.dense.", "temb.dense").replace(".", "/")
        norm = "norm" in layer.split("/")[-1]
        leaf = {"weight": "gamma" if norm else "W", "bias": "beta" if norm else "b"}[leaf]
        if value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0].T
        elif value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        variables[f"model/{layer}/{leaf}"] = value
    return variables


def save_with_tensorflow(path, variables, **options):
    """Writes a checkpoint with TensorFlow; returns the path."""
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        made = [tf.compat.v1.get_variable(name, initializer=value) for name, value in variables.items()]
        session.run(tf.compat.v1.global_variables_initializer())
        return tf.compat.v1.train.Saver(made).save(session, str(path), **options)
