"""Publishes weights with a model page: to a folder, a bucket or the Hugging Face Hub."""

from __future__ import annotations

import pathlib
import shutil
import tempfile

from diffusion_jax.errors import PretrainedError, UserError, print_text
from diffusion_jax.evaluation.features import sample_files
from diffusion_jax.files import write_text
from diffusion_jax.pretrained import Model, origin, save_diffusers, save_safetensors
from diffusion_jax.report.model_card import SAMPLES, model_card, without_folders
from diffusion_jax.storage import hub, objects
from diffusion_jax.untrusted import leads_out


def publish(net: Model, to: str, workdir: pathlib.Path | None, license: str, data: str) -> str:
    """Writes weights with a card and samples, in this package's format, and in diffusers' format for networks of diffusers.

    to: a folder, or gs:// or s3://BUCKET/PREFIX, that is empty or does not exist, or hf://OWNER/NAME. workdir: the work
    directory of the run that trained the weights; the card has the run's settings, metrics with their protocol, and a picture
    of the newest samples. license: a name that the Hub uses, such as mit. data: a description of the training data.
    Returns: the name for `pretrained.load`. Raises: UserError, PretrainedError, StorageError, OSError.
    """
    to, target = to.rstrip("/"), pathlib.Path(to).expanduser()
    if not license.strip() or not data.strip():
        raise UserError("publish needs --license=NAME, such as mit, and --data=TEXT, what the weights were trained on")
    if hub.is_hub(to):
        hub.check_repository(to)
    elif objects.is_url(to):
        if objects.open_store(to).list():
            raise UserError(f"{to} has objects already; delete them, or give a new prefix")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{to} is not an empty folder; give a new one")
    source = origin(net)
    if source and source["license"].lower().replace(" ", "-") != license.lower():
        print_text(
            f"Note: the weights come from {source['source']} (license: {source['license']}), published as {license}."
        )
    net = without_folders(net)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "weights"  # the name of this folder is not in the files
        try:
            save_diffusers(net, folder)
        except PretrainedError as error:
            shutil.rmtree(folder, ignore_errors=True)
            print_text(f"Note: without diffusers' format: {error}")
        folder.mkdir(exist_ok=True)
        save_safetensors(net, folder / hub.OWN_FILE)
        if workdir is not None:
            pictures = [path.with_suffix(".png") for path in sample_files(workdir)]
            shown = [path for path in pictures if path.is_file() and not leads_out(path, workdir)]
            if shown:
                shutil.copyfile(shown[0], folder / SAMPLES)
        write_text(folder / "README.md", model_card(net, folder, workdir, license, data, to))
        if hub.is_hub(to):
            hub.upload(folder, to)
        elif objects.is_url(to):
            files = [path for path in folder.rglob("*") if path.is_file()]
            objects.open_store(to, write=True).upload_all({path: path.relative_to(folder).as_posix() for path in files})
        else:
            shutil.copytree(folder, target, dirs_exist_ok=True)
    return to
