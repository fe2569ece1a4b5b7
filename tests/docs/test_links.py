"""Links between pages lead somewhere: to a file that is there, and to a heading that it has."""

from __future__ import annotations

import re

import pytest
from pages import PAGES, ROOT, text

import sparseprune as sp

_CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]*`", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
#: A page that is made while the site is built -> what it is made of.
_MADE = re.compile(r"docs/generated/(\w+)\.md")


def anchors(page: str) -> set[str]:
    """What the headings of a page are called in a link, as GitHub and the site call them."""
    if made := _MADE.fullmatch(page):
        return anchors(f"examples/notebooks/{made[1]}.ipynb")
    content = text(page)
    for included in re.findall(r"^```{include} (\S+)$", content, re.M):
        content += ((ROOT / page).parent / included).read_text(encoding="utf-8")
    heads = re.findall(r"^#+ (.+?)$", re.sub(r"^( *)```.*?^\1```$", "", content, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.replace("`", "").strip().lower()).replace(" ", "-") for head in heads}


def broken(page: str, content: str) -> list[str]:
    """The links of a page with this content that lead nowhere."""
    found = []
    for link in _LINK.findall(_CODE.sub("", content)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        place = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        name = place.relative_to(ROOT).as_posix()
        if made := _MADE.fullmatch(name):
            place = ROOT / "examples" / "notebooks" / f"{made[1]}.ipynb"
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(name)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    assert broken(page, text(page)) == []


def test_a_broken_link_is_seen():
    content = "[a](quickstart.md) [b](nothing.md) [c](quickstart.md#nowhere) ![d](pictures/none.png) `[e](no.md)`"
    assert broken("docs/index.md", content) == ["nothing.md", "quickstart.md#nowhere", "pictures/none.png"]


def test_every_page_is_in_the_tree_of_the_site():
    listed = set()
    for page in PAGES:
        for tree in re.findall(r"^```{toctree}\n(.*?)^```$", text(page), re.M | re.S):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(ROOT / page).parent.relative_to(ROOT).joinpath(f"{name}.md").as_posix() for name in names}
    site = {page for page in PAGES if page.startswith("docs/")} - {"docs/index.md"}
    notebooks = {f"docs/generated/{path.stem}.md" for path in (ROOT / "examples" / "notebooks").glob("*.ipynb")}
    assert listed == site | notebooks and notebooks


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(text(page) for page in PAGES if page.startswith("docs/api/"))
    named = set(re.findall(r"^\.\. auto\w+:: sparseprune\.([\w.]+)$", reference, re.M))
    assert set(sp._PUBLIC) <= named
    assert len(named) == len(re.findall(r"^\.\. auto", reference, re.M))
