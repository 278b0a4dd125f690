import sysconfig
from pathlib import Path

import pytest

from megamod.data.corpus import builtin
from megamod.data.corpus.builtin import load_builtin_documents
from megamod.data.corpus.documents import SPLITS, assign_split
from megamod.errors import UserError


def test_domains_are_real_distinct_and_repeatable():
    domains = load_builtin_documents(400_000)
    assert list(domains) == ["python_code", "c_headers", "reference_prose", "package_texts"]
    for documents in domains.values():
        sizes = [len(document.encode()) for document in documents]
        assert 320_000 < sum(sizes) <= 400_000
        assert len(set(documents)) == len(documents) >= 60
        assert min(map(len, documents)) >= 200
        assert max(map(len, documents)) <= 4000
    assert load_builtin_documents(400_000) == domains
    shares = {
        name: sum("import" in document or "def " in document for document in documents)
        / len(documents)
        for name, documents in domains.items()
    }
    assert max(shares, key=shares.get) == "python_code"
    shares = {
        name: sum(document.count(";") for document in documents)
        for name, documents in domains.items()
    }
    assert max(shares, key=shares.get) == "c_headers"


def test_every_split_of_every_domain_has_documents():
    for documents in load_builtin_documents().values():
        result = [assign_split(document, 0) for document in documents]
        assert min(result.count(split) for split in SPLITS) >= 3


def test_reference_prose_is_the_text_of_help():
    from pydoc_data.topics import topics

    text = "\n".join(topics.values())
    documents = list(builtin._read_help_topics(Path(sysconfig.get_path("stdlib"))))
    assert all(document in text for document in documents)
    assert sum(map(len, documents)) > 0.9 * len(text)


def test_missing_sources_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(builtin, "_find_header_folders", lambda: [tmp_path])
    with pytest.raises(UserError, match=r"c_headers needs 60 .* headers of Python, numpy"):
        load_builtin_documents()
