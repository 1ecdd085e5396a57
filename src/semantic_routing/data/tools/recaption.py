"""``semroute data recaption``: a model on a server describes every image, into a sidecar Parquet file of captions.

``OUT.parts`` next to that file holds the request, the parts (see ``caption_parts.py``) and every answer that is not yet
in a part. A restart therefore requests only what is missing, and nothing is paid for twice.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image
from tqdm import tqdm

from semantic_routing.chat.client import ChatClient, Usage
from semantic_routing.chat.messages import Answer, Failure, Picture, Question
from semantic_routing.chat.server import ChatConfig
from semantic_routing.chat.spoken import CUT, THOUGHTS, FirstAnswers, spoken
from semantic_routing.common.errors import BadData, TrainingFailed
from semantic_routing.common.files import check_writable, read_text
from semantic_routing.common.images.decode import decode
from semantic_routing.common.images.dimensions import dimensions
from semantic_routing.common.locks import LOCK, claimed
from semantic_routing.data.captions import USUAL
from semantic_routing.data.sidecar import source_label, with_source
from semantic_routing.data.sources.index import open_records
from semantic_routing.data.sources.records import ConcatRecords, Record
from semantic_routing.data.sources.storage import absolute
from semantic_routing.data.tools.caption_parts import CaptionRow, Parts

INSTRUCTION = (
    "Describe this picture in one dense paragraph for someone who is to paint it without having seen it. Name every "
    "object with its number, colour, material, shape, size and place; what people and animals do and wear; how things "
    "lie to each other; text word for word; then background, light, point of view and style. Say only what can be "
    "seen, without guesses and without introduction."
)
OLD_CAPTION = "\n\nThe picture was found with this text, which may help, say little or be wrong: "
"""Text before a record's own caption."""
ANSWERS = "answers"
NO_THINKING = 'turn reasoning off, for example with --extra \'{"chat_template_kwargs": {"enable_thinking": false}}\''
ADVICE = {
    CUT: f"raise --max-tokens, or {NO_THINKING}",
    THOUGHTS: NO_THINKING,
    "": "check that the model accepts images and supports the request's parameters, which --extra adds and removes",
}
"""Advice by reason, if the first answers hold no caption."""


@dataclass(frozen=True, kw_only=True)
class RecaptionArguments:
    """Let a model on an OpenAI-compatible server describe every image; writes a sidecar file of captions."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Tar shards, Parquet files, manifests or folders: paths, patterns or URLs; or folders of indices."""
    out: Path
    """Parquet file of captions to write, with the columns key, caption, model, prompt_tokens and completion_tokens."""
    index: Path | None = None
    """Folder of the index, if it is not in the data's folder."""
    instruction: Path | None = None
    """Text file with the instruction for the model, instead of the built-in one."""
    show_caption: bool = False
    """Show the old caption to the model, too."""
    pixels: int = 768 * 768
    """Larger images are reduced to this number of pixels (width times height) before they are sent."""
    quality: int = 90
    """Quality of the JPEG that is sent, from 1 to 100."""
    max_tokens: int = 512
    """Maximum length of a caption in tokens; one that is cut off counts as failed."""
    part_rows: int = 1000
    """Records per part."""
    max_failed: float = 0.1
    """Share of records without a caption above which the command fails, after it has written the others."""
    server: Annotated[ChatConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=ChatConfig)

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError("semroute data recaption needs paths of data")
        labels = Counter(source_label(path) for path in self.paths)
        if repeated := [label for label, count in labels.items() if count > 1]:
            raise ValueError(
                f"several paths end in {repeated[0]}, so captions could not be told apart: recaption them one at a time"
            )
        if self.out.suffix != ".parquet":
            raise ValueError(f"out is {self.out}; name it .parquet")
        for name in ("pixels", "quality", "max_tokens", "part_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def recaption(args: RecaptionArguments) -> str:
    """Request all missing captions, write the file and return a summary.

    Raises TrainingFailed, after writing, if more than ``max_failed`` of the records have no caption; ValueError, and
    writes nothing, if no record has a caption.
    """
    records = ConcatRecords([open_records(path, args.index) for path in args.paths])
    if not len(records):
        raise ValueError(f"there are no records in {', '.join(args.paths)}")
    check_writable(args.out.parent)
    folder = args.out.with_name(f"{args.out.name}.parts")
    with claimed(folder / LOCK, args.out):
        return _recaption(args, records, Parts(folder, len(records), args.part_rows))


def _recaption(args: RecaptionArguments, records: ConcatRecords, parts: Parts) -> str:
    instruction = INSTRUCTION if args.instruction is None else _read_instruction(args.instruction)
    client = ChatClient(args.server if args.server.cache else replace(args.server, cache=parts.folder / ANSWERS))
    parts.claim(_request(args, instruction, len(records)))
    passing = None if args.server.cache else client.cache
    keys: dict[int, str] = {}
    first = FirstAnswers(ADVICE)

    def question(position: int) -> Question | Failure:
        try:
            record = records.read(position)
            keys[position] = record.key
            return _question(args, instruction, record)
        except BadData as error:
            keys.setdefault(position, error.key)
            return Failure(reason=error.reason, detail=error.detail, final=True)

    with tqdm(total=len(records), desc="Captioning", unit="image") as bar:
        for position, answer in client.run(parts.missing(bar.update), question):
            name, key = answer.question if isinstance(answer, Answer) else "", keys.pop(position)
            if len(args.paths) > 1:  # keys are unique only within a source
                key = with_source(records.source(position).name, key)
            row = _row(position, key, answer)
            if isinstance(answer, Answer):
                first.note(row.reason)
            for done in parts.add(row, name):
                if passing is not None:
                    passing.remove(done)  # its caption is now in a part
            bar.update()
    if passing is not None:
        passing.clear()  # left by a process that was stopped between writing a part and this removal
    return _summary(args, len(records), parts.join(args.out), client.usage)


def _question(args: RecaptionArguments, instruction: str, record: Record) -> Question:
    """Make the question about a record; BadData if its picture cannot be decoded."""
    width, height = dimensions(record.image)
    scale = min(1.0, math.sqrt(args.pixels / (width * height)))
    pixels = decode(record.image, max(1, int(height * scale)), max(1, int(width * scale)))
    picture = Picture.encode(Image.fromarray(pixels), args.quality)
    text = instruction
    old = next((record.captions[key][0] for key in USUAL if record.captions.get(key)), "")
    if args.show_caption and old:
        text += OLD_CAPTION + old
    return Question(parts=(picture, text), parameters={"max_tokens": args.max_tokens})


def _request(args: RecaptionArguments, instruction: str, records: int) -> dict[str, Any]:
    """Return all settings that affect the captions."""
    settings = {name: getattr(args, name) for name in ("show_caption", "pixels", "quality", "max_tokens")}
    data = {"paths": [absolute(path) for path in args.paths], "records": records, "part_rows": args.part_rows}
    server = {"model": args.server.model, "extra": args.server.extra_parameters()}
    keys = {"keys": "with source"} if len(args.paths) > 1 else {}
    return server | settings | {"instruction": instruction} | data | keys


def _read_instruction(path: Path) -> str:
    text = read_text(path, "the instruction").strip()
    if not text:
        raise ValueError(f"the instruction {path} is empty; write what the model should do")
    return text


def _row(position: int, key: str, answer: Answer | Failure) -> CaptionRow:
    """Make a row of an answer; the model's reasoning is not part of its caption."""
    if isinstance(answer, Answer):
        caption = spoken(answer)
        if isinstance(caption, str):
            return CaptionRow(
                position=position,
                key=key,
                caption=caption,
                model=answer.model,
                prompt_tokens=answer.prompt_tokens,
                completion_tokens=answer.completion_tokens,
            )
        answer = caption
    return CaptionRow(position=position, key=key, reason=answer.reason, detail=answer.detail, final=answer.final)


def _summary(args: RecaptionArguments, records: int, reasons: Counter[str], usage: Usage) -> str:
    failed = reasons.total()
    lines = [f"{records - failed:,} of {records:,} records have captions by {args.server.model}"]
    lines += [f"  {reason:<22}{count:>8,}" for reason, count in reasons.most_common()]
    tokens = f"{usage.prompt_tokens:,} prompt and {usage.completion_tokens:,} completion tokens"
    lines.append(f"{usage.requests:,} requests, {tokens}" + (f", cost {usage.cost:,.2f}" if usage.cost else ""))
    if failed > args.max_failed * records:
        what = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise TrainingFailed(
            f"{failed} of {records} records have no caption ({what}), more than the {args.max_failed:.0%} allowed; "
            f"{args.out} holds the others; run the same command again to retry those that may succeed"
        )
    return "\n".join([*lines, str(args.out)])
