"""`inspect`, `browse` and `select`: tables → pages to look through them, and images chosen from them."""

import re
from typing import Literal

from raydet.config.fields import config, option, require, require_not_negative, require_positive
from raydet.config.training import AugmentationSpec

Criterion = Literal["uncertainty", "rare", "disagreement", "diversity"]
Compare = Literal["thumbnail", "embedding"]


@config
class InspectConfig:
    """An images table → one HTML page: statistics, suspicious labels, and images as training sees them."""

    data: str | list[str] = option(
        "images table, or several to train on together; TABLE:WEIGHT shows each of its images WEIGHT times per epoch",
        value="TABLE[:WEIGHT] ...",
    )
    out: str = option("folder to write: inspect.html, and the tables with its numbers", operational=True)
    val_data: str | None = option("images table to compare with --data: class shares, sizes, identical images", None)
    train_config: str | None = option(
        "training config (YAML), for its rename_classes and repeat_rare; the images are shown with its model, "
        "image_size, augmentation and seed; by default as the recipe of the model decides",
        None,
    )
    augmentation: AugmentationSpec | None = option(
        "augmentation, written as in train; overrides that of --train-config", None
    )
    model: str | None = option("model whose resize the images are shown with; overrides that of --train-config", None)
    image_size: int | None = option("input side in pixels; overrides that of --train-config", None)
    num_images: int = option("maximum images per class, limited by the page's size; 0 shows none", 6)
    seed: int = option("seed of the sample of images", 0)

    def __post_init__(self) -> None:
        require(self.data != [], "--data must name at least one images table")
        require_not_negative(self, "num_images", "seed")


@config
class BrowseConfig:
    """Images, detections or evaluated runs → a page on this machine to look through them; Ctrl-C ends it."""

    data: str = option("images table, detections table, or metrics folder as written by evaluate")
    second: str | None = option(
        "detections table or metrics folder to show beside the first, of the same images", None, value="DATA"
    )
    images: str | None = option(
        "images of a detections table: an images table, whose labels are shown too, a folder, a list or tar files; by "
        "default those that the run scored",
        None,
    )
    run: str | None = option("run to show, if the metrics folder holds several; by default the last one", None)
    second_run: str | None = option(
        "run to show beside the first, of --second or, without it, of the same metrics folder", None, value="RUN"
    )
    crops: list[str] | None = option(
        "crops tables of the detections: their answers are shown beside the boxes, and can be filtered by",
        None,
        value="CROPS",
    )
    score_threshold: float | None = option(
        "lowest score at which a detection is judged against the labels; by default the one with the best F1 of an "
        "evaluated run, otherwise 0.3",
        None,
        group="Detections",
    )
    selection: str = option(
        "where the page saves a selection: SELECTION.parquet lists ids and paths, SELECTION.txt the files",
        "selection",
        group="Output",
        operational=True,
    )
    port: int = option("port on 127.0.0.1; 0 takes a free one", 0, group="Output", operational=True)

    def __post_init__(self) -> None:
        threshold = self.score_threshold
        require(threshold is None or 0 <= threshold <= 1, f"--score-threshold must be between 0 and 1, got {threshold}")
        require(0 <= self.port < 2**16, f"--port must be between 0 and 65535, got {self.port}")
        require(bool(self.selection.strip("/ ")), "--selection must name a place for the lists")


@config
class SelectConfig:
    """A detections table → what to label next, images that are nearly the same, or what is similar to one of them."""

    detections: str = option(
        "detections table; --near-duplicates needs thumbnails (predict --keep thumbnail) or embeddings (--keep "
        "embedding), --similar-to and --by diversity need embeddings"
    )
    out: str = option("folder to write: a table, and a list of images", operational=True)
    by: list[Criterion] = option(
        "find the images whose labels would teach most: uncertainty (of scores), rare (classes), disagreement (with "
        "--other), diversity (of embeddings); several are combined by their ranks",
        default_factory=list,
    )
    other: str | None = option(
        "with --by disagreement: detections of another run in the same images", None, value="DETECTIONS"
    )
    labelled_data: str | None = option(
        "with --by: images table of what is labelled already; its images are not chosen, nor near-duplicates of them, "
        "and its classes are not rare",
        None,
        value="DATA",
    )
    near_duplicates: bool = option("find the images that are nearly the same as an earlier image", False)
    similar_to: str | None = option(
        "find the objects most similar to a detection: the id of its image and its place by score, from 0; without the "
        "place, the images most similar to that image",
        None,
        value="IMAGE_ID:BOX",
    )
    compare: Compare | None = option(
        "what --near-duplicates and --min-similarity compare: thumbnails, which are alike if the pictures are, or "
        "embeddings, which are alike if the model sees the same in them; by default thumbnails if there are any",
        None,
    )
    min_similarity: float | None = option(
        "similarity from which on two images are near-duplicates, 1 if they are equal; by default 0.95 for thumbnails; "
        "for embeddings required with --near-duplicates; with --by, near-duplicates of labelled and chosen images are "
        "left out; with --similar-to the least similarity of a result",
        None,
    )
    num: int = option("with --by and --similar-to: how many to find", 100)
    ray_address: str | None = option(
        "with --near-duplicates and --similar-to: Ray cluster that compares the vectors, or `local` to start one on "
        "this machine; by default this process compares them",
        None,
        group="Compute and cluster",
        operational=True,
    )

    def __post_init__(self) -> None:
        require(
            [bool(self.by), self.near_duplicates, self.similar_to is not None].count(True) == 1,
            "set one of --by, --near-duplicates and --similar-to IMAGE_ID:BOX",
        )
        require(
            ("disagreement" in self.by) == (self.other is not None),
            "--by disagreement needs --other, the detections of another run, and nothing else does",
        )
        require(bool(self.by) or self.labelled_data is None, "--labelled-data needs --by")
        require(len(set(self.by)) == len(self.by), "--by names a criterion twice")
        require(self.ray_address is None or bool(self.ray_address.strip()), "--ray-address must not be empty")
        require(self.ray_address is None or not self.by, "--by does not use Ray; omit --ray-address")
        require(
            self.similar_to is None or re.fullmatch(r"\d{1,16}(:\d{1,9})?", self.similar_to) is not None,
            f"--similar-to must be written as IMAGE_ID:BOX, such as 17:0, or IMAGE_ID; got {self.similar_to}",
        )
        require(
            self.similar_to is None or self.compare is None,
            "--similar-to compares embeddings; omit --compare",
        )
        require(
            not (self.near_duplicates and self.compare == "embedding") or self.min_similarity is not None,
            "--compare embedding needs --min-similarity, which depends on the model; look at some pairs first",
        )
        require(
            self.min_similarity is None or -1 <= self.min_similarity <= 1,
            f"--min-similarity must be from -1 to 1, got {self.min_similarity}",
        )
        require_positive(self, "num")
