"""``valign detector search``: images or texts, found by a hyperbolic CLIP that keeps unsafe queries from unsafe results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from rich.text import Text
from typer import Argument, Option

from valign.checks import UserError
from valign.cli.common import AsJson, checked, out
from valign.cli.early import refuse_detector

SEARCH_EXAMPLE = 'example: valign detector search detectors/hysac "a violent red flame" --images made/ --top 3'


def search_command(
    name: Annotated[
        str,
        Argument(
            metavar="NAME",
            help="a folder of `valign train hysac`, or its name on the shelf",
            callback=checked(refuse_detector, "NAME"),
        ),
    ],
    queries: Annotated[list[str], Argument(metavar="QUERY", help="prompts or image files")],
    images: Annotated[Path | None, Option(help="folder of images to search in")] = None,
    texts: Annotated[Path | None, Option(help="file of texts to search in instead, one a line")] = None,
    top: Annotated[int, Option(min=1, help="results of each query")] = 5,
    margin: Annotated[float, Option(help="of the bound that unsafe queries are moved to: 1 is the paper's, 0 has none")] = 1.0,
    exact: Annotated[bool, Option("--exact", help="move to the bound itself; the released code moves further in")] = False,
    plain: Annotated[bool, Option("--plain", help="search without moving unsafe queries")] = False,
    as_json: AsJson = False,
) -> None:
    """Search images or texts by a hyperbolic CLIP: an unsafe query is moved towards the root, and finds its safe neighbours."""
    from valign.data.prompts.tables import read_table, text_cell
    from valign.detectors import find_folder
    from valign.guard.images.safe_search import SafeSearch
    from valign.images import image_files, open_image
    from valign.models.encoders.hyperbolic_clip import load_hyperbolic

    if (images is None) == (texts is None):
        raise UserError("valign detector search needs --images FOLDER or --texts FILE, one of the two.")
    clip = load_hyperbolic(find_folder(name) or Path(name))
    if images is not None:
        files = image_files(images)
        labels, items = [str(file.relative_to(images)) for file in files], clip.image_points([open_image(file) for file in files])
    else:
        assert texts is not None
        labels = [text_cell("prompt", row.get("prompt")) for row in read_table(texts)]
        items = clip.text_points(labels)
    index = SafeSearch(clip, items, "image" if images is not None else "text", margin, exact)
    rows: list[dict[str, Any]] = []
    for query in queries:
        file = Path(query)
        points = clip.image_points([open_image(file)]) if file.is_file() else clip.text_points([query])
        found = index.find(points, top=top, safe=not plain)[0]
        limit = clip.card.image if file.is_file() else clip.card.text
        harm = None if limit is None else float(limit.probability(clip.root_distances(points))[0])
        rows.append(
            {
                "query": query,
                "harm": harm,
                "unsafe": None if limit is None or harm is None else harm >= limit.limit,
                "moved": found.moved,
                "found": [{"item": labels[item], "distance": far} for item, far in zip(found.items, found.distances)],
            }
        )
    if as_json:
        out.print_json(data=rows)
        return
    for row in rows:
        known = {True: "unsafe", False: "safe", None: "not judged, for it was trained on captions alone"}[row["unsafe"]]
        verdict = known if row["harm"] is None else f"{known}, probability of harm {row['harm']:.3f}"
        out.print(Text(f"{row['query']}: {verdict}{', moved' if row['moved'] else ''}"))
        for one in row["found"]:
            out.print(Text(f"  {one['distance']:.3f}  {one['item']}"), soft_wrap=True)
