"""All cases: each kind of hostile thing × each format that it can stand in."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile import archives, base, models, pictures, servers, tables, texts, things, tiffs
from tests.hostile.case import Case, Scene, unique
from tests.hostile.formats import FORMATS, Format, changed
from tests.hostile.options import option_cases, output_cases
from tests.hostile.rights import Rights

Change = Callable[[Scene], None]


def all_cases(good: Path | None) -> list[Case]:
    """Return all cases; without a folder of good data, those that need to read none."""
    return unique(
        [
            *(case for form in FORMATS for make in _KINDS for case in _share(form, make(form, good))),
            *(Case("controls", form.name, _NOTHING, form.build, True, 60, form.weight) for form in FORMATS),
            *_archives(),
            *_tiffs(),
            *_web(),
            *_coco_structures(),
            *_on_ray(),
            *_hub_names(),
            *option_cases(),
            *output_cases(),
        ]
    )


def _share(form: Format, cases: Iterator[Case]) -> Iterator[Case]:
    """Leave out cases whose code is tried with another format; another share for each format."""
    offset = FORMATS.index(form) % form.every
    for number, case in enumerate(cases):
        if number % form.every == offset or (case.kind in _OWN and not form.tables):
            yield case


def _case(form: Format, kind: str, thing: str, change: Change, *, survives: bool = False, **more: Any) -> Case:
    return Case(kind, form.name, thing, changed(form, change), survives, form.seconds, form.weight, **more)


def _files(form: Format, _: Path | None) -> Iterator[Case]:
    for place in (*form.texts, *form.files, *form.images, *form.folders):
        for thing in things.FILES:
            if thing == "growing" and place in form.folders:
                continue

            def change(scene: Scene, place: str = place, thing: str = thing) -> None:
                things.put(scene, scene.data / form.base / place, thing)

            survives = place in form.images or place in form.single
            rights: Rights = "owner" if thing == "unreadable" else "all"
            may_change = ("data",) if thing == "growing" else ()
            is_named = form.follows_links or f"{{data}}/{place}".rstrip("/") in form.command.split()
            shown = f"{thing} as {place or 'the folder'}"
            yield _case(
                form,
                "files",
                shown,
                change,
                survives=survives,
                rights=rights,
                may_read_outside=is_named,
                may_change=may_change,
            )


def _whole_texts(form: Format, _: Path | None) -> Iterator[Case]:
    for place, syntax in form.texts.items():
        for thing, make in {**texts.WHOLE, **texts.BY_SYNTAX[syntax]}.items():

            def change(scene: Scene, place: str = place, make: texts.Change = make) -> None:
                path = scene.data / form.base / place
                path.write_bytes(make(path.read_bytes()))

            yield _case(form, "texts", f"{thing} as {place}", change, survives=place in form.single)


def _values(form: Format, good: Path | None) -> Iterator[Case]:
    for place, syntax in form.texts.items():
        content, fields = _good_text(form, place, good), form.only.get(place)
        found = [item for item in texts.templates(content, syntax) if fields is None or item[0] in fields]
        for number, (field, template, without) in enumerate(found):
            # Of a document with many fields, each gets half of the values, and its neighbours the other half.
            values = list(texts.VALUES) if len(found) < _MANY_FIELDS else list(texts.VALUES)[number % 2 :: 2]
            yield _value_case(form, "values", place, f"{field} is missing", without, "")
            for name in values:
                yield _value_case(form, "values", place, f"{field} is {name}", template, texts.value_of(name, syntax))
            names: dict[str, dict[str, str]] = {
                "names": things.NAMES if field in form.paths.get(place, ()) else {},
                "class names": things.LABELS if field in form.classes.get(place, ()) else {},
            }
            for kind, own in names.items():
                for name, text in own.items():
                    yield _value_case(form, kind, place, f"{field} is {name}", template, texts.encoded(text, syntax))


def _good_text(form: Format, place: str, good: Path | None) -> str:
    """Return a text of the good data, which raydet itself may have written; empty if it is not there."""
    written = base.TEXTS.get(f"{form.base}/{place}")
    if written is None and good is not None and (good / form.base / place).exists():
        return (good / form.base / place).read_text()
    return written or ""


def _value_case(form: Format, kind: str, place: str, thing: str, template: str, value: str) -> Case:
    def change(scene: Scene) -> None:
        text = texts.fill(template, value)
        (scene.data / form.base / place).write_bytes(text.replace(b"@OUTSIDE@", bytes(scene.outside)))

    return _case(
        form, kind, f"{place}: {thing}", change, survives=place in form.single, may_read_outside=form.follows_links
    )


def _pictures(form: Format, _: Path | None) -> Iterator[Case]:
    for place in form.images:
        for name in pictures.PICTURES:

            def change(scene: Scene, place: str = place, name: str = name) -> None:
                source = scene.base / "pictures" / pictures.file_name(name)
                shutil.copy(source, scene.data / form.base / place)

            yield _case(form, "pictures", name, change, survives=True)


def _names_on_disk(form: Format, _: Path | None) -> Iterator[Case]:
    for place in form.images:
        for name, text in things.NAMES.items():
            data = text.encode("utf-8", "surrogateescape") if "\ud800" not in text else b""
            if len(data) > 250 or not data.strip() or b"\0" in data or b"/" in data or data == b".":
                continue

            def change(scene: Scene, place: str = place, data: bytes = data) -> None:
                path = scene.data / form.base / place
                shutil.copy(bytes(path), bytes(path.parent) + b"/" + data)

            yield _case(form, "names on disk", name, change, survives=True)


def _damaged_tables(form: Format, _: Path | None) -> Iterator[Case]:
    for place, kind in form.tables.items():
        own = {
            "tables": tables.damages(kind),
            "class names": {} if kind in ("per_image", "rows") else tables.CLASS_NAMES,
        }
        for group, damages in own.items():
            for name, damage in damages.items():

                def change(scene: Scene, place: str = place, damage: tables.Damage = damage) -> None:
                    damage(scene.data / form.base / place)

                yield _case(form, group, f"{place}: {name}", change)


def _models(form: Format, _: Path | None) -> Iterator[Case]:
    if form.base != "model":
        return
    for name, damage in models.MODELS.items():
        yield _case(form, "models", name, lambda scene, damage=damage: damage(scene.data / form.base))  # type: ignore[misc]


_MANY_FIELDS = 6
_NOTHING = "nothing hostile"
_OWN = ("texts", "values", "names", "class names")
"""Kinds of which each format of annotations has code of its own."""
_KINDS = (_files, _whole_texts, _values, _pictures, _names_on_disk, _damaged_tables, _models)


def _archives() -> Iterator[Case]:
    for shape, place in (("predict tar", "x.tar"), ("predict tars", "shards/x.tar")):
        command = (
            f"predict --checkpoint {{base}}/model --data {{data}}/{place.rpartition('/')[0] or place} --out {{out}}"
        )
        form = Format(shape, "archive", command, weight="heavy")
        for name in (*archives.ARCHIVES, *archives.WHOLE_ARCHIVES):

            def build(scene: Scene, name: str = name, place: str = place, form: Format = form) -> list[str]:
                path = scene.data / form.base / place
                path.parent.mkdir(parents=True)
                path.write_bytes(archives.archive(name))
                return form.words(scene)

            yield Case("archives", shape, name, build, weight="heavy")
        for thing in things.FILES:
            if thing in things.NEED_THE_FILE:
                continue

            def put(scene: Scene, thing: str = thing, place: str = place, form: Format = form) -> list[str]:
                path = scene.data / form.base / place
                path.parent.mkdir(parents=True)
                things.put(scene, path, thing)
                return form.words(scene)

            yield Case("files", shape, f"{thing} as {place}", put, weight="heavy")


def _tiffs() -> Iterator[Case]:
    form = next(form for form in FORMATS if form.name == "predict windowed")
    for name, make in tiffs.TIFFS.items():

        def change(scene: Scene, make: pictures.Make = make) -> None:
            (scene.data / form.base / "b.tif").write_bytes(make())

        yield _case(form, "tiffs", name, change, survives=True)


def _web() -> Iterator[Case]:
    for name, answer in servers.ANSWERS.items():

        def listed(scene: Scene, answer: servers.Answer = answer) -> list[str]:
            port = servers.add(scene, answer, servers.good_image(scene.base))
            (scene.data / "list.txt").write_text(f"http://127.0.0.1:{port}/a.png\nhttp://127.0.0.1:{port}/b.png\n")
            return ["prepare", "images", "--images", str(scene.data / "list.txt"), "--out", str(scene.out)]

        def on_the_web(scene: Scene, answer: servers.Answer = answer) -> list[str]:
            port = servers.add(scene, answer, servers.good_image(scene.base))
            return ["prepare", "images", "--images", f"http://127.0.0.1:{port}/hostile.txt", "--out", str(scene.out)]

        yield Case("web", "image list", name, listed, survives=True, seconds=60)
        yield Case("web", "list on the web", name, on_the_web, seconds=60)


def _coco_structures() -> Iterator[Case]:
    for name in ("coco", "evaluate json"):
        form = next(form for form in FORMATS if form.name == name)
        for thing, make in texts.COCO.items():

            def change(scene: Scene, form: Format = form, make: Callable[[Any], Any] = make) -> None:
                (scene.data / form.base / "coco.json").write_text(json.dumps(make(base.coco())))

            yield _case(form, "structure", thing, change)


_TRAIN = (
    "train --train-data {data}/images --val-data {data}/images --model rt_detr_v2_tiny --epochs 1 --batch-size 2 "
    "--image-size 64 --augmentation flip --log-images 0 --threads-per-worker 1 --out {out}"
)
_ON_RAY_PICTURES = (
    "png, 144 Mpx of 16-bit RGBA",
    "png, 89,478,485 high",
    "png, a text that is a bomb",
    "jpeg, 3,000 cheap scans of 100 Mpx",
    "webp, lossless 13,000 on each side",
    "tiff, looping directories",
)
_ON_RAY_TABLES = (
    "part outside",
    "encrypted footer",
    "changed data 0",
    "a category of 2",
    "a category of -1",
    "a box that is NaN",
    "a box that is huge",
    "too many values of category",
    "the first image_id is -1",
    "width is 0",
    "objects is text",
    "an image that is null",
    "a path to absolute and outside",
)
_ON_RAY_MODELS = ("its own code", "only pickled weights", "a tensor of 2^60 values", "a backbone of another repository")


def _on_ray() -> Iterator[Case]:
    """Yield the few cases that start Ray."""
    training = Format("train", "tables", _TRAIN, weight="ray", seconds=150)
    for name in _ON_RAY_PICTURES:
        make = pictures.PICTURES[name]
        yield _case(training, "pictures", name, _of_table(lambda make=make: tables.pictured(make())))  # type: ignore[misc]
    for name in _ON_RAY_TABLES:
        yield _case(training, "tables", name, _of_table(lambda name=name: tables.damages("images")[name]))  # type: ignore[misc]
    model = dataclasses.replace(
        training, base="model", command=_TRAIN.replace("{data}", "{base}/tables").replace("rt_detr_v2_tiny", "{data}")
    )
    for name in _ON_RAY_MODELS:
        damage = models.MODELS[name]
        yield _case(model, "models", name, lambda scene, damage=damage: damage(scene.data / "model"))  # type: ignore[misc]
    for form in FORMATS:
        if form.name not in ("coco", "predict folder"):
            continue
        options = " --use-ray true" if form.name == "coco" else " --num-workers 2"
        on_ray = dataclasses.replace(
            form, name=f"{form.name} on Ray", command=form.command + options, weight="ray", seconds=150
        )
        for case in _pictures(on_ray, None):
            if case.thing in _ON_RAY_PICTURES:
                yield case


def _of_table(damage: Callable[[], tables.Damage]) -> Change:
    return lambda scene: damage()(scene.data / "tables" / "images")


def _hub_names() -> Iterator[Case]:
    form = next(form for form in FORMATS if form.name == "hub rows")
    for name, text in things.NAMES.items():
        if any("\ud800" <= character <= "\udfff" for character in text):
            continue

        def change(scene: Scene, text: str = text) -> None:
            name = text.replace("@OUTSIDE@", str(scene.outside))
            base.hub_rows(scene.data / form.base, ["a.png", name])

        yield _case(dataclasses.replace(form), "names", f"path is {name}", change, survives=True)
