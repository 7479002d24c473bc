"""The model card of a checkpoint: what the run says of it, and nothing else."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from vip.checkpoints.reading import text
from vip.errors import UserError
from vip.options import mistake
from vip.reporting.runs import EpochLog, read_run
from vip.training.config import TrainConfig

TASK = "image-classification"
_OF_THE_MACHINE = {"data", "experiment", "device", "workers", "wandb_project", "log_wandb", "log_tensorboard"}
_PLACES = ("DIR", "PATH", "FILE", "PATH|NAME")
_CITATIONS = {
    "vision_permutator": """@article{hou2021vision,
  title={Vision Permutator: A Permutable MLP-Like Architecture for Visual Recognition},
  author={Hou, Qibin and Jiang, Zihang and Yuan, Li and Cheng, Ming-Ming and Yan, Shuicheng and Feng, Jiashi},
  journal={arXiv preprint arXiv:2106.12368},
  year={2021}
}""",
    "lv_vit": """@article{jiang2021all,
  title={All Tokens Matter: Token Labeling for Training Better Vision Transformers},
  author={Jiang, Zihang and Hou, Qibin and Yuan, Li and Zhou, Daquan and Shi, Yujun and Jin, Xiaojie and Wang, Anran
    and Feng, Jiashi},
  journal={arXiv preprint arXiv:2104.10858},
  year={2021}
}""",
    "external_attention_mlp": """@article{guo2022beyond,
  title={Beyond Self-attention: External Attention using Two Linear Layers for Visual Tasks},
  author={Guo, Meng-Hao and Liu, Zheng-Ning and Mu, Tai-Jiang and Hu, Shi-Min},
  journal={IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year={2022}
}""",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of the run that a checkpoint is from.

    Attributes:
        data: Name of the data set, without its place.
        recipe: Options that are not the defaults, without those of a machine.
        epochs: Epochs that the run has done, None without its log.
        epoch: The checkpoint's epoch, from 0 on.
        top1: In percent on the validation split, None where it was not measured with the weights that are taken.
        top5: The same.
    """

    data: str
    recipe: dict[str, Any]
    epochs: int | None = None
    epoch: int | None = None
    top1: float | None = None
    top5: float | None = None


def read_of(checkpoint: dict[str, Any], path: Path, evaluated: bool) -> Run:
    """Read what there is to say of a checkpoint's run.

    Args:
        checkpoint: The checkpoint, as `vip.training.validation.load_model` gives it.
        path: Its file, beside which a run has its log and its options.
        evaluated: The weights that are taken are those that training validated.
    """
    log = _log_of(path.parent)
    args = checkpoint.get("args") or (log.options if log else {})
    run = Run(_data_name(args), _recipe(args))
    epoch = checkpoint.get("epoch")
    if log is None or not isinstance(epoch, int) or not 0 <= epoch < len(log.rows):
        return run
    row = log.rows[epoch] if evaluated else {}
    return dataclasses.replace(
        run, epochs=len(log.rows), epoch=epoch, top1=row.get("eval_top1"), top5=row.get("eval_top5")
    )


def _log_of(folder: Path) -> EpochLog | None:
    try:
        return read_run(folder)
    except UserError:  # a checkpoint alone, without the log of its run
        return None


def _data_name(args: dict[str, Any]) -> str:
    return text(args.get("dataset")) or Path(text(args.get("data")) or text(args.get("data_dir")) or "").name


def _recipe(args: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from the defaults, without those that name a place of the machine."""
    recipe, hints = {}, get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        value = args.get(field.name)
        is_place = field.name in _OF_THE_MACHINE or field.metadata["metavar"] in _PLACES
        if is_place or value is None or mistake(value, hints[field.name], field.metadata)[1]:
            continue
        if value != (field.default_factory() if callable(field.default_factory) else field.default):
            recipe[field.name] = value
    return recipe


def write_card(model: nn.Module, about: dict[str, Any], run: Run, repo: str, license: str | None) -> str:
    """Write a model card in the form of the Hugging Face Hub.

    Args:
        model: The model.
        about: What `vip.training.preprocessing.describe` says of it.
        run: What is known of its run.
        repo: Name of its repository.
        license: Identifier of a license; None: the card names none.
    """
    package, _, module = type(model).__module__.rpartition(".")
    ours = package == "vip.models"
    tags = [TASK, "timm", *(["vision-permutator"] if ours else [])]
    data = ModelCardData(
        library_name="timm", pipeline_tag=TASK, tags=tags, license=license, **_results(run, repo.split("/")[-1])
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo}",
        _model_part(model, about),
        _run_part(run),
        _use_part(repo, ours),
        f"## Citation\n\n```bibtex\n{_CITATIONS[module]}\n```" if ours and module in _CITATIONS else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _results(run: Run, name: str) -> dict[str, Any]:
    if run.top1 is None or run.top5 is None or not run.data:
        return {}
    kind: dict[str, Any] = dict(
        task_type=TASK, dataset_type="imagefolder", dataset_name=run.data, dataset_split="validation"
    )
    results = [
        EvalResult(**kind, metric_type="accuracy", metric_name=f"top-{k}", metric_value=round(value, 3))
        for k, value in ((1, run.top1), (5, run.top5))
    ]
    return {"model_name": name, "metrics": ["accuracy"], "eval_results": results}


def _model_part(model: nn.Module, about: dict[str, Any]) -> str:
    rows = {
        "architecture": f"`{about['architecture']}`",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "classes": about["num_classes"],
        "input (channels, height, width)": " x ".join(map(str, about["input_size"])),
        "mean, standard deviation": f"{about['mean']}, {about['std']}",
        "crop": f"{about['crop_pct']} of the image, {about['crop_mode']}",
        "interpolation": about["interpolation"],
    }
    return "## Model\n\n| | |\n| :--- | :--- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _run_part(run: Run) -> str:
    lines = [f"Data: {run.data}"] if run.data else []
    if run.epoch is not None:
        lines.append(f"Weights of epoch {run.epoch}, counted from 0, of {run.epochs} epochs")
    if run.top1 is not None and run.top5 is not None:
        lines.append(f"Top-1 {run.top1:.3f} %, top-5 {run.top5:.3f} % on its validation split, as training measured it")
    facts = "\n".join(f"- {line}" for line in lines)
    try:
        recipe = yaml.safe_dump(run.recipe, sort_keys=False).strip() if run.recipe else ""
    except yaml.YAMLError as e:
        raise UserError(f"The checkpoint's options cannot be written as YAML ({e}); see vip checkpoint inspect.") from e
    options = f"Options of `vip train` that are not its defaults:\n\n```yaml\n{recipe}\n```" if recipe else ""
    return "\n\n".join(part for part in ("## Training", facts, options) if part) if facts or options else ""


def _use_part(repo: str, ours: bool) -> str:
    lines = ["import timm", *(["import vip  # registers the model with timm"] if ours else []), ""]
    lines.append(f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()')
    lines.append("transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))")
    code = "\n".join(lines)
    return f"## Use\n\n```python\n{code}\n```\n\n```bash\nvip validate DATA --model hf-hub:{repo}\n```"
