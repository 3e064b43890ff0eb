r"""Score the images that are new since the last run; start it every night, from cron or a KubeRay CronJob.

    ray job submit … -- python jobs/nightly.py --images s3://…/photos --out s3://…/scored \
        --checkpoint s3://…/checkpoint --num-workers 4 --use-gpu

All options but the first two are those of `raydet predict`. Each night becomes one detections table, OUT/DATE, and
OUT/DATE.txt lists its images. All nights together are OUT/*/part-*.parquet.
"""

import argparse
import datetime

import raydet
from raydet.cli.main import run_function
from raydet.config.options import load
from raydet.images.files import ImageFolder, image_files_below
from raydet.tables import storage


def score_new_images() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("images", "out"):
        parser.add_argument(f"--{name}", required=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--night", default=today, help="name of the table; name an interrupted night to finish it")
    options, of_predict = parser.parse_known_args()
    table = storage.join(options.out, options.night)
    # First, so that a mistake in an option ends the job before it writes anything.
    config = load(raydet.PredictConfig, [*of_predict, f"--data={table}.txt", f"--out={table}"])
    lists = [name for name in storage.list_files(options.out) if name.endswith(".txt")]
    # The list is written before the first image is scored and never changed: a job that is killed and started again
    # scores the same images, and a night that failed keeps its images, rather than leaving them to the next night.
    if f"{options.night}.txt" not in lists:
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


run_function(score_new_images)
