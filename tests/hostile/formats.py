"""The commands that read a stranger's files, each with a good input and the places where something can be hostile."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raydet.cluster.job_record import JOB_FILE
from raydet.tables.layout import MANIFEST_NAME
from tests.hostile.case import Scene
from tests.hostile.models import CONFIG_FIELDS


@dataclass(frozen=True)
class Format:
    """One way to run a command on files.

    Attributes:
        name: Column of the summary.
        base: Folder of the base that is copied.
        command: The command line, with `{data}` for the copy, `{base}` for the base and `{out}` for OUT.
        texts: Text files by path in the copy, with their syntax.
        files: Other files that the command reads.
        images: Image files of which one may be bad.
        folders: Folders that the command line names.
        paths: Fields that hold the name of a file, by text file.
        classes: Fields that hold the name of a class, by text file.
        single: Text files that concern one image of several.
        tables: Tables that can be damaged, with their kind.
        only: If not empty, the fields that get wrong values, by text file.
        every: Take every n-th case where the code that reads a thing is that of another format, each format others.
        follows_links: Links to files elsewhere are read, since a list may name any file.
        weight: As of the case.
        seconds: As of the case.
    """

    name: str
    base: str
    command: str
    texts: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[str] = ()
    images: Sequence[str] = ()
    folders: Sequence[str] = ()
    paths: Mapping[str, Sequence[str]] = field(default_factory=dict)
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    single: Sequence[str] = ()
    tables: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    every: int = 1
    follows_links: bool = False
    weight: str = "light"
    seconds: float = 20

    def build(self, scene: Scene) -> list[str]:
        """Copy the good input and return the command line."""
        scene.copy(self.base)
        return self.words(scene)

    def words(self, scene: Scene) -> list[str]:
        """Return the command line."""
        where = {"data": str(scene.data / self.base), "out": str(scene.out), "base": str(scene.base)}
        return [word.format(**where) for word in self.command.split()]


def changed(form: Format, change: Callable[[Scene], None]) -> Callable[[Scene], list[str]]:
    """Return the function that builds a good input and then changes it."""

    def build(scene: Scene) -> list[str]:
        words = form.build(scene)
        change(scene)
        return words

    return build


_PART = "part-00000.parquet"


def _table(name: str, kind: str, command: str, *, every: int = 1, weight: str = "light") -> Format:
    """Return the format of a command that reads a table."""
    return Format(
        name,
        "tables",
        command,
        texts={f"{kind}/{MANIFEST_NAME}": "json"},
        files=[f"{kind}/{_PART}"],
        folders=[kind],
        tables={kind: kind},
        every=every,
        weight=weight,
    )


_PREPARE = (
    Format(
        "coco",
        "coco",
        "prepare coco --annotations {data}/coco.json --images {data}/images --out {out}",
        texts={"coco.json": "json"},
        images=["images/b.png"],
        folders=["images"],
        paths={"coco.json": ["images.0.file_name"]},
        classes={"coco.json": ["categories.0.name"]},
    ),
    Format(
        "voc",
        "voc",
        "prepare voc --annotations {data}/xml --images {data}/images --out {out}",
        texts={"xml/b.xml": "xml"},
        images=["images/b.png"],
        folders=["images", "xml"],
        paths={"xml/b.xml": ["filename"]},
        classes={"xml/b.xml": ["name"]},
        single=["xml/b.xml"],
        every=4,
    ),
    Format(
        "voc split",
        "voc",
        "prepare voc --annotations {data}/xml --images {data}/images --split {data}/split.txt "
        "--classes {data}/classes.txt --out {out}",
        texts={"split.txt": "txt", "classes.txt": "txt"},
        paths={"split.txt": ["column 0"]},
        classes={"classes.txt": ["column 0"]},
    ),
    Format(
        "yolo",
        "yolo",
        "prepare yolo --data {data}/data.yaml --out {out}",
        texts={"data.yaml": "yaml", "labels/train/b.txt": "txt"},
        images=["images/train/b.png"],
        folders=["images/train", "labels/train"],
        paths={"data.yaml": ["path", "train"]},
        classes={"data.yaml": ["names.0"]},
        single=["labels/train/b.txt"],
        every=4,
    ),
    Format(
        "yolo list",
        "yolo list",
        "prepare yolo --data {data}/data.yaml --out {out}",
        texts={"list.txt": "txt"},
        paths={"list.txt": ["column 0"]},
    ),
    Format(
        "yolo folders",
        "yolo",
        "prepare yolo --images {data}/images --labels {data}/labels --classes {data}/classes.txt --out {out}",
        texts={"classes.txt": "txt"},
        folders=["images", "labels"],
        classes={"classes.txt": ["column 0"]},
        every=4,
    ),
    Format(
        "cvat",
        "cvat",
        "prepare cvat --annotations {data}/cvat.xml --images {data}/images --out {out}",
        texts={"cvat.xml": "xml"},
        images=["images/b.png"],
        folders=["images"],
        paths={"cvat.xml": ["image.name"]},
        classes={"cvat.xml": ["box.label", "name"]},
        every=4,
    ),
    Format(
        "label-studio",
        "label-studio",
        "prepare label-studio --annotations {data}/tasks.json --images {data}/images --out {out}",
        texts={"tasks.json": "json"},
        images=["images/b.png"],
        folders=["images"],
        paths={"tasks.json": ["0.data.image"]},
        classes={"tasks.json": ["0.annotations.0.result.0.value.rectanglelabels.0"]},
        every=4,
    ),
    Format(
        "csv",
        "csv",
        "prepare csv --annotations {data}/boxes.csv --images {data}/images --out {out}",
        texts={"boxes.csv": "csv"},
        images=["images/b.png"],
        folders=["images"],
        paths={"boxes.csv": ["column 0"]},
        classes={"boxes.csv": ["column 3"]},
        every=4,
    ),
    Format(
        "csv without header",
        "csv",
        "prepare csv --annotations {data}/retinanet.csv --images {data}/images --out {out}",
        texts={"retinanet.csv": "csv"},
        paths={"retinanet.csv": ["column 0"]},
        classes={"retinanet.csv": ["column 5"]},
    ),
    Format(
        "images",
        "images",
        "prepare images --images {data} --out {out}",
        images=["b.png"],
        folders=[""],
    ),
    Format(
        "image list",
        "images",
        "prepare images --images {data}/list.txt --out {out}",
        texts={"list.txt": "txt"},
        images=["b.png"],
        paths={"list.txt": ["column 0"]},
        every=2,
        follows_links=True,
    ),
    Format(
        "image csv",
        "images",
        "prepare images --images {data}/list.csv --out {out}",
        texts={"list.csv": "csv"},
        paths={"list.csv": ["column 0"]},
        follows_links=True,
    ),
    Format(
        "hub folder",
        "hub",
        "prepare hub --dataset {data} --out {out}",
        texts={"metadata.jsonl": "jsonl"},
        images=["b.png"],
        folders=[""],
        paths={"metadata.jsonl": ["file_name"]},
        classes={"metadata.jsonl": ["objects.category.0"]},
        every=2,
    ),
    Format(
        "hub rows",
        "hub rows",
        "prepare hub --dataset {data}/rows.parquet --out {out}",
        files=["rows.parquet"],
        images=["b.png"],
        tables={"": "rows"},
        every=2,
    ),
)

_TABLES = (
    _table("prepare hub", "images", "prepare hub --dataset {data}/images --out {out}", every=2),
    _table(
        "evaluate truth",
        "images",
        "evaluate --truth {data}/images --detections {data}/detections --bootstrap 10 --out {out}",
    ),
    _table(
        "evaluate detections",
        "detections",
        "evaluate --truth {data}/images --detections {data}/detections --bootstrap 10 --out {out}",
    ),
    _table(
        "compare",
        "detections",
        "compare --truth {base}/tables/images --first {base}/tables/detections --second {data}/detections "
        "--bootstrap 10 --out {out}",
        every=3,
    ),
    _table("inspect", "images", "inspect --data {data}/images --num-images 2 --out {out}", weight="heavy", every=4),
    _table("export coco", "images", "export coco --data {data}/images --out {out}/x.json", every=4),
    _table("export coco results", "detections", "export coco --data {data}/detections --out {out}/x.json", every=4),
    _table("export voc", "images", "export voc --data {data}/images --out {out}", every=4),
    _table("export yolo", "detections", "export yolo --data {data}/detections --out {out}", every=4),
    _table("export cvat", "images", "export cvat --data {data}/images --out {out}", every=4),
    _table("export label-studio", "detections", "export label-studio --data {data}/detections --out {out}", every=4),
    _table(
        "predict table",
        "images",
        "predict --checkpoint {base}/model --data {data}/images --out {out}",
        weight="heavy",
        every=2,
    ),
    Format(
        "report",
        "metrics",
        "report --metrics {data} --out {out}/report.html",
        texts={f"metrics/{MANIFEST_NAME}": "json", f"runs/{MANIFEST_NAME}": "json"},
        files=["metrics/detections.parquet", "per_image/detections.parquet"],
        folders=["", "metrics"],
        tables={"metrics": "metrics", "runs": "runs", "per_image": "per_image"},
        every=2,
    ),
    Format(
        "evaluate json",
        "coco",
        "evaluate --truth {data}/coco.json --detections {data}/results.json --bootstrap 10 --out {out}",
        texts={"coco.json": "json", "results.json": "json"},
        classes={"coco.json": ["categories.0.name"]},
    ),
)

_OTHERS = (
    Format(
        "predict folder",
        "images",
        "predict --checkpoint {base}/model --data {data} --out {out}",
        images=["b.png"],
        folders=[""],
        weight="heavy",
        every=2,
    ),
    Format(
        "predict list",
        "images",
        "predict --checkpoint {base}/model --data {data}/list.txt --out {out}",
        texts={"list.txt": "txt"},
        paths={"list.txt": ["column 0"]},
        weight="heavy",
        follows_links=True,
    ),
    Format(
        "predict windowed",
        "windowed",
        "predict --checkpoint {base}/model --data {data} --tile 1024 --windowed --out {out}",
        images=["b.tif"],
        folders=[""],
        weight="heavy",
        every=8,
    ),
    Format(
        "predict model",
        "model",
        "predict --checkpoint {data} --data {base}/images --limit 1 --out {out}",
        texts={"config.json": "json", "preprocessor_config.json": "json"},
        files=["model.safetensors"],
        folders=[""],
        classes={"config.json": ["raydet.categories.0.name"]},
        only={"config.json": CONFIG_FIELDS},
        weight="heavy",
    ),
    Format(
        "plan",
        "run",
        "plan --run {data} --images 1000",
        texts={JOB_FILE: "json"},
        folders=[""],
        weight="heavy",
    ),
    Format(
        "report run",
        "train run",
        "report --metrics {base}/metrics --train-run {data} --out {out}/report.html",
        texts={"log/history.json": "json"},
        folders=["", "log"],
    ),
)

FORMATS = (*_PREPARE, *_TABLES, *_OTHERS)
