"""Language models of Hugging Face's transformers, as they come."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn


class CausalLM(nn.Module):
    """A model of transformers that predicts the next token: from a folder, or small and new from a configuration.

    Args:
        num_classes: size of the vocabulary; with `path`, the tokens that the data have.
        context: largest number of tokens that a new model reads.
        path: a folder with `config.json` and weights (`save_pretrained`); None builds a new model.
        model_type: of a new model, as transformers calls it: `llama`, `qwen3`, `gemma3_text`, ...
        settings: fields of its configuration.

    Attributes:
        model: the model of transformers.

    Raises:
        ImportError: transformers is not installed.
        FileNotFoundError: no such folder.
        ValueError: an unknown type, or a vocabulary smaller than that of the data.
    """

    def __init__(
        self,
        num_classes: int,
        context: int,
        path: str | None = None,
        model_type: str = "llama",
        settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ImportError("language models need the package transformers: pip install 'qat[hf]'") from error
        build: Any = transformers.AutoModelForCausalLM
        if path is None:
            sizes = {"vocab_size": num_classes, "max_position_embeddings": context, "use_cache": False}
            self.model = build.from_config(transformers.AutoConfig.for_model(model_type, **sizes, **settings or {}))
        elif (Path(path) / "config.json").is_file():
            self.model = build.from_pretrained(path, local_files_only=True)
        else:
            raise FileNotFoundError(f"model.path={path!r}: there is no folder with a config.json of transformers")
        if self.model.config.vocab_size < num_classes:
            raise ValueError(
                f"model.path={path!r} knows {self.model.config.vocab_size} tokens, the data have {num_classes}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map indices (N, T) int64 to logits of each next token (N, T, vocabulary)."""
        logits: Tensor = self.model(input_ids=x, use_cache=False).logits
        return logits
