"""Wrong values of options, hostile config files, and places that cannot be written."""

import json
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

from raydet.cli.commands import COMMANDS
from raydet.cluster.job_record import JOB_FILE
from raydet.config.fields import fields_of
from raydet.tables.layout import MANIFEST_NAME
from raydet.tables.output_folder import LOCK_FILE, RUN_FILE
from raydet.tables.table import REJECTED_FOLDER
from tests.hostile import texts, things
from tests.hostile.case import Case, Scene
from tests.hostile.rights import Rights

GOOD_LINES: dict[str, str] = {
    "prepare coco": "--annotations {base}/coco/coco.json --images {base}/coco/images --out {out}",
    "prepare voc": "--annotations {base}/voc/xml --images {base}/voc/images --out {out}",
    "prepare yolo": "--data {base}/yolo/data.yaml --out {out}",
    "prepare hub": "--dataset {base}/hub --out {out}",
    "prepare cvat": "--annotations {base}/cvat/cvat.xml --images {base}/cvat/images --out {out}",
    "prepare label-studio": "--annotations {base}/label-studio/tasks.json "
    "--images {base}/label-studio/images --out {out}",
    "prepare csv": "--annotations {base}/csv/boxes.csv --images {base}/csv/images --out {out}",
    "prepare images": "--images {base}/images --out {out}",
    "prepare shapes": "--out {out} --num-train 2 --num-val 2 --image-size 32",
    "inspect": "--data {base}/tables/images --num-images 1 --out {out}",
    "evaluate": "--truth {base}/tables/images --detections {base}/tables/detections --bootstrap 10 --out {out}",
    "compare": "--truth {base}/tables/images --first {base}/tables/detections --second {base}/tables/detections "
    "--bootstrap 10 --out {out}",
    "report": "--metrics {base}/metrics --out {out}",
    "export coco": "--data {base}/tables/images --out {out}",
    "export voc": "--data {base}/tables/images --out {out}",
    "export yolo": "--data {base}/tables/images --out {out}",
    "export cvat": "--data {base}/tables/images --out {out}",
    "export label-studio": "--data {base}/tables/images --out {out}",
    "export onnx": "--checkpoint {base}/model --out {out}",
    "predict": "--checkpoint {base}/model --data {base}/images --limit 1 --out {out}",
    "plan": "--run {base}/run --images 1000",
    "push": "--checkpoint {base}/model --repo owner/name",
    "train": "--train-data {base}/nothing --val-data {base}/nothing --out {out}",
    "tune": "--train-config {base}/nothing.yaml --space {{}} --out {out}",
}
"""Options of each command on good data; those that would start Ray name a table that is missing."""
_ENDINGS = {"report": ".html", "export coco": ".json", "export onnx": ".onnx"}
_HEAVY = ("inspect", "predict", "push", "export onnx", "train", "tune", "plan")
_NUMBERS = {
    "nan": "nan",
    "inf": "inf",
    "-.inf": "-.inf",
    "1e400": "1e400",
    "0": "0",
    "2^63": str(2**63),
    "5,000 digits": "9" * 5_000,
    "a list": "[1]",
    "nothing": "",
}
_TEXTS = {
    "escape sequences": things.ESCAPE,
    "bidirectional": things.BIDI,
    "half a surrogate": "a\udce4",
    "5,000 characters": "n" * 5_000,
    "nothing": "",
    "a newline": "a\nb",
    "an alias": "*a",
    "a Python object": "!!python/object/apply:os.system [touch x]",
}


def words_of(command: str, scene: Scene, out: str | None = None) -> list[str]:
    """Return the command line on good data."""
    place = str(scene.out) + _ENDINGS.get(command, "") if out is None else out
    return [*command.split(), *(word.format(base=scene.base, out=place) for word in GOOD_LINES[command].split())]


def _weight(command: str) -> str:
    return "heavy" if command in _HEAVY else "light"


def option_cases() -> Iterator[Case]:
    """Yield a wrong value for each option of each command, and hostile config files."""
    for command, line in GOOD_LINES.items():
        if "nothing" not in line and command != "push":  # which has no Hub to speak to

            def good(scene: Scene, command: str = command) -> list[str]:
                return words_of(command, scene)

            yield Case("controls", f"{command} alone", "nothing hostile", good, True, 60, _weight(command))
        for item in fields_of(COMMANDS[command].config):
            hint = typing.get_type_hints(COMMANDS[command].config)[item.name]
            kinds = {hint, *typing.get_args(hint)}
            values = _NUMBERS if kinds & {int, float} else _TEXTS if str in kinds or "list" in str(hint) else {}
            if item.name == "out" or (command.startswith("prepare ") and _is_shared(command, item.name)):
                continue
            for name, value in values.items():

                def build(scene: Scene, command: str = command, name: str = item.name, value: str = value) -> list[str]:
                    return [*words_of(command, scene), f"--{name}={value}"]

                yield Case("options", command, f"{item.name} is {name}", build, weight=_weight(command))
        yield from _config_files(command)


def _is_shared(command: str, name: str) -> bool:
    """Return True for an option that another `prepare` is tried with."""
    shared = {item.name for item in fields_of(COMMANDS["prepare images"].config)} - {"images"}
    return command != "prepare images" and name in shared


def _config_files(command: str) -> Iterator[Case]:
    good = json.dumps({"out": "x"}).encode()
    changes: dict[str, Callable[[bytes], bytes]] = {**texts.WHOLE, **texts.BY_SYNTAX["yaml"]}
    chosen = changes if command in ("prepare coco", "evaluate", "train") else dict(list(changes.items())[::6])
    for name, change in chosen.items():

        def build(scene: Scene, change: Callable[[bytes], bytes] = change) -> list[str]:
            (scene.data / "config.yaml").write_bytes(change(good))
            return [*words_of(command, scene), "--config", str(scene.data / "config.yaml")]

        yield Case("configs", command, name, build, weight=_weight(command))
    if command not in ("prepare coco", "train"):
        return
    for thing in things.FILES:

        def put(scene: Scene, thing: str = thing) -> list[str]:
            path = scene.data / "config.yaml"
            path.write_bytes(good)
            things.put(scene, path, thing)
            return [*words_of(command, scene), "--config", str(path)]

        yield Case(
            "files",
            f"config of {command}",
            thing,
            put,
            weight=_weight(command),
            rights="owner" if thing == "unreadable" else "all",
            may_change=("data",) if thing == "growing" else (),
        )


def _folder_that_is_closed(scene: Scene) -> str:
    (scene.made / "closed").mkdir(mode=0o555)
    return str(scene.made / "closed" / "out")


def _closed_itself(scene: Scene) -> str:
    scene.out.mkdir(mode=0o555)
    return str(scene.out)


def _linked(target: Callable[[Scene], Path]) -> Callable[[Scene], str]:
    def place(scene: Scene) -> str:
        scene.out.symlink_to(target(scene))
        return str(scene.out)

    return place


def _file(scene: Scene) -> str:
    scene.out.write_text("mine")
    return str(scene.out)


def _special(thing: str) -> Callable[[Scene], str]:
    def place(scene: Scene) -> str:
        things.put(scene, scene.out, thing)
        return str(scene.out)

    return place


def _filled(name: str, content: str | None) -> Callable[[Scene], str]:
    """Return a folder that holds something under a name that raydet uses; None stands for a link out."""

    def place(scene: Scene) -> str:
        scene.out.mkdir()
        if content is None:
            (scene.out / name).symlink_to(scene.outside / "secret.txt")
        elif content == "fifo":
            things.put(scene, scene.out / name, "fifo")
        else:
            (scene.out / name).write_text(content)
        return str(scene.out)

    return place


_OWN_NAMES = (
    LOCK_FILE,
    RUN_FILE,
    MANIFEST_NAME,
    "config.yaml",
    JOB_FILE,
    "part-00000.parquet",
    REJECTED_FOLDER,
)

PLACES: dict[str, Callable[[Scene], str]] = {
    "a file": _file,
    "below a file": lambda scene: _file(scene) + "/out",
    "a FIFO": _special("fifo"),
    "a socket": _special("socket"),
    "a device": _special("device"),
    "in a closed folder": _folder_that_is_closed,
    "a closed folder": _closed_itself,
    "a dangling link": _linked(lambda scene: scene.made / "nothing"),
    "a looping link": _linked(lambda scene: scene.out),
    "a link to a folder outside": _linked(lambda scene: scene.outside),
    "a link to a file outside": _linked(lambda scene: scene.outside / "secret.txt"),
    "web": lambda _: "http://127.0.0.1:9/out",
    "secure web": lambda _: "https://127.0.0.1:9/out",
    "FTP": lambda _: "ftp://127.0.0.1/out",
    "unknown scheme": lambda _: "gopher://host/out",
    "no path": lambda _: "s3://",
    "a scheme alone": lambda _: "://",
    "file URI": lambda scene: f"file://{scene.out}",
    "file URI with a host": lambda scene: f"file://host{scene.out}",
    "memory": lambda _: "memory://out",
    "300 characters": lambda scene: str(scene.made / ("n" * 300)),
    "5,000 characters": lambda scene: str(scene.made / ("n/" * 2_500 + "n")),
    "nothing": lambda _: "",
    "spaces": lambda scene: str(scene.made / "  "),
    "half a surrogate": lambda scene: str(scene.made / "a\udce4"),
    "escape sequences": lambda scene: str(scene.made / things.ESCAPE),
    "bidirectional": lambda scene: str(scene.made / things.BIDI),
    "newline": lambda scene: str(scene.made / "a\nraydet: error: forged"),
    "/proc": lambda _: "/proc/out",
    "/dev/null": lambda _: "/dev/null",
    "/dev/full": lambda _: "/dev/full",
    "the root": lambda _: "/",
    "parents": lambda scene: str(scene.made / "a" / ".." / ".." / "made" / "out"),
    **{f"with a link called {name}": _filled(name, None) for name in _OWN_NAMES},
    **{f"with a FIFO called {name}": _filled(name, "fifo") for name in _OWN_NAMES},
    **{f"with a text called {name}": _filled(name, "{}") for name in _OWN_NAMES},
}
"""Places for OUT."""
_CLOSED = ("in a closed folder", "a closed folder")
_NOT_AS_ROOT = (
    "/proc",
    "/dev/null",
    "/dev/full",
    "the root",
    "no path",
    "a scheme alone",
)
"""Root could write there, and would damage this machine."""
_FOLDER_COMMANDS = ("prepare coco", "evaluate", "predict", "inspect", "train")


def output_cases() -> Iterator[Case]:
    """Yield each place for each command that writes."""
    for command, line in GOOD_LINES.items():
        if "--out" not in line:
            continue
        for number, (name, make) in enumerate(PLACES.items()):
            if command not in _FOLDER_COMMANDS and (name.startswith("with a ") or (number + len(command)) % 2):
                continue  # half of the places for commands that share the code of another

            def build(scene: Scene, command: str = command, make: Callable[[Scene], str] = make) -> list[str]:
                return words_of(command, scene, make(scene))

            may_change = ("here",) if name in ("nothing", "a scheme alone", "unknown scheme") else ()
            rights: Rights = "owner" if name in _CLOSED else "reader" if name in _NOT_AS_ROOT else "all"
            weight = _weight(command)
            yield Case("outputs", command, name, build, weight=weight, rights=rights, may_change=may_change)
