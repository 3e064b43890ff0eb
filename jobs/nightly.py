"""Score the images that are new since the last run; start it every night, from cron or a KubeRay CronJob.

    ray job submit … -- python jobs/nightly.py --predict predict.yaml --images s3://…/photos --out s3://…/scored

Each night becomes one detections table, OUT/DATE, and OUT/DATE.txt lists its images. All nights together are
OUT/*/part-*.parquet.
"""

import datetime
from dataclasses import dataclass

import raydet
from raydet.cli.main import run_function
from raydet.config.fields import option
from raydet.config.options import load_file
from raydet.images.files import ImageFolder, image_files_below
from raydet.tables import storage


@dataclass(frozen=True, kw_only=True)
class Nightly:
    """Images that earlier nights have not scored → one detections table per night."""

    predict: str = option("config file of `raydet predict`: checkpoint, workers, engine")
    images: str = option("folder or URI of the images, with its subfolders")
    out: str = option("folder or URI of the tables")
    night: str | None = option("name of the table: by default the date; name an interrupted night to finish it", None)


def score_new_images(options: Nightly) -> None:
    night = options.night or datetime.datetime.now(datetime.UTC).date().isoformat()
    table = storage.join(options.out, night)
    # First, so that a mistake in it ends the job before anything is written.
    config = load_file(raydet.PredictConfig, options.predict, data=f"{table}.txt", out=table)
    lists = [name for name in storage.list_files(options.out) if name.endswith(".txt")]
    # The list is written before the first image is scored and never changed: a job that is killed and started again
    # scores the same images, and a night that failed keeps its images, rather than leaving them to the next night.
    if f"{night}.txt" not in lists:
        known = {path for name in lists for path in read_list(storage.join(options.out, name))}
        folder = ImageFolder(options.images)
        found = map(folder.uri_of, image_files_below(folder))
        # A name with a line break cannot be in a list.
        new = [path for path in found if path not in known and path.isprintable()]
        if not new:
            print("no new images")
            return
        storage.make_folder(options.out)
        storage.write_bytes(f"{table}.txt", "".join(f"{path}\n" for path in new).encode())
    print(*raydet.predict(config).lines(), sep="\n")


def read_list(uri: str) -> list[str]:
    return storage.read_bytes(uri).decode().splitlines()


run_function(score_new_images, Nightly)
