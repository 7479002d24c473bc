"""Models as files of other programs: ONNX, torch.export, AOTInductor and TorchScript."""

from .formats import FORMATS, export_model, load_exported

__all__ = ["FORMATS", "export_model", "load_exported"]
