"""VQAScore by a vision-language model on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from semantic_routing.chat.messages import Failure
from semantic_routing.chat.spoken import FirstAnswers
from semantic_routing.common.connection import check_hub
from semantic_routing.common.files import hash_files
from semantic_routing.evaluation.benchmark import Finding, Task
from semantic_routing.evaluation.genai_bench import VQASCORE
from semantic_routing.evaluation.judges.base import checked_template, open_rgb, sha256
from semantic_routing.evaluation.judges.vqascore import VQA_TEMPLATES
from semantic_routing.text.quiet import quiet_transformers

YES = "Yes"
SPELLINGS = (YES, "yes", "YES", " Yes", " yes", "No", "no", "NO", " No", " no")
"""Spellings of the first token of an answer."""
LEAST_MASS = 0.01
"""Probability that these must have together. Less than of a server's judge: over the whole vocabulary it is exact."""
ADVICE = {
    "": "VQAScore needs a judge whose first word is yes or no: an instruction-tuned model that does not reason first"
}


class LocalVQAJudge:
    """The probability, over the whole vocabulary, that the first token of an answer is that of Yes."""

    usage = None

    def __init__(
        self, model: Any, processor: Any, *, name: str, weights: str = "", template: str = VQA_TEMPLATES["3.1"]
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: An image-text-to-text model of transformers; it keeps its device and dtype.
            processor: Its processor, with a chat template.
            name: Its name in manifests.
            weights: What distinguishes its weights from others of that name, such as their hash.
            template: The question, with {} in place of the prompt.
        """
        if getattr(processor, "chat_template", None) is None:
            raise ValueError(f"{name} has no chat template; use an instruction-tuned model as the judge")
        self.model, self.processor, self.name, self.weights = model.eval(), processor, name, weights
        self.template = checked_template(template, "{}", "the template")
        spelled = [processor.tokenizer(name, add_special_tokens=False)["input_ids"] for name in SPELLINGS]
        self._yes = spelled[0][0]
        whole = {ids[0] for ids in spelled if len(ids) == 1} - {processor.tokenizer.unk_token_id}
        self._answers = sorted({self._yes} | whole)
        self._first = FirstAnswers(ADVICE)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        template: str = VQA_TEMPLATES["3.1"],
    ) -> LocalVQAJudge:
        """Load a model from a folder or the hub; ValueError if it cannot judge."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        check_hub(name_or_path)
        try:
            with quiet_transformers():
                processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
                model = AutoModelForImageTextToText.from_pretrained(
                    name_or_path, dtype=dtype, use_safetensors=True, trust_remote_code=False
                )
        except ImportError as error:  # the processors of some models are written with torchvision
            raise ValueError(f"{name_or_path!r} needs another package: {' '.join(str(error).split())[:200]}") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"no judge at {name_or_path!r}: {str(error).strip().partition(chr(10))[0]}; give a folder with a "
                "vision-language model and its processor, or a model's name on the Hugging Face hub"
            ) from error
        # Of a model on the hub, the commit; a folder's files are read once more.
        weights = getattr(model.config, "_commit_hash", None) or hash_files(Path(name_or_path).glob("*.safetensors"))
        return cls(model.to(device), processor, name=name_or_path, weights=weights, template=template)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the judge's identity and settings, for manifests."""
        return {
            "scorer": "vqascore-local",
            "model": self.name,
            "weights": self.weights,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "template": self.template,
            "template_sha256": sha256(self.template),
            "versions": {"transformers": version("transformers")},
        }

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        """Yield every task with its finding, in order."""
        for task in tasks:
            image = open_rgb(task.path)
            if isinstance(image, Failure):
                yield task, Finding(scores={VQASCORE: None}, reason=str(image))
            else:
                p, mass = self.p_yes(image, self.template.replace("{}", task.prompt.text))
                reason = "" if mass >= LEAST_MASS else f"hardly any probability of yes or no: {mass:.1e} together"
                self._first.note(reason)
                yield task, Finding(scores={VQASCORE: None if reason else p}, reason=reason)

    @torch.inference_mode()
    def p_yes(self, image: Image.Image, question: str) -> tuple[float, float]:
        """Return the probability of Yes as the first token of the answer, and that of all spellings of yes and no.

        The image comes first, then the question.
        """
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        logits = self.model(**inputs, logits_to_keep=1).logits[0, -1]
        found = logits.double().softmax(dim=-1)
        return float(found[self._yes]), float(found[self._answers].sum())
