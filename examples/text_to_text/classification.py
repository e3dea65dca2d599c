"""The text classification data sets of the original code. They have test labels but no validation split.

A part of the training split is used for validation. The original's `amazon` is a local file with five classes; the Hub
has the version with two classes in Parquet.
"""

from __future__ import annotations

from text_to_text.tasks import Task


def classification(repo: str, revision: str, columns: tuple[str, ...], words: tuple[str, ...], **options) -> Task:
    return Task(repo, None, revision, columns, words, validation=None, test="test", **options)


CLASSIFICATION = {
    "imdb": classification(
        "stanfordnlp/imdb",
        "e6281661ce1c48d982bc483cf8a173c1bbeb5d31",
        ("text",),
        ("negative", "positive"),
        prefix="imdb",
    ),
    "ag_news": classification(
        "fancyzhx/ag_news",
        "eb185aade064a813bc0b7f42de02595523103ca4",
        ("text",),
        ("world", "sports", "business", "science"),
        prefix="ag_news",
    ),
    "yelp_review_full": classification(
        "Yelp/yelp_review_full",
        "c1f9ee939b7d05667af864ee1cb066393154bf85",
        ("text",),
        ("terrible", "bad", "middle", "good", "wonderful"),
        prefix="yelp_review_full",
    ),
    "yahoo_answers_topics": classification(
        "community-datasets/yahoo_answers_topics",
        "6652a1e7c94f7260a0bfd0c9092dd48e2d536ea1",
        ("question_title", "question_content", "best_answer"),
        (
            "society and culture",
            "science",
            "health",
            "education and reference",
            "computers and internet",
            "sports",
            "business",
            "entertainment and music",
            "family and relationships",
            "politics and government",
        ),
        prefix="yahoo_answers_topics",
        label="topic",
    ),
    "dbpedia_14": classification(
        "fancyzhx/dbpedia_14",
        "9abd46cf7fc8b4c64290f26993c540b92aa145ac",
        ("title", "content"),
        (
            "company",
            "educational institution",
            "artist",
            "athlete",
            "office holder",
            "means of transportation",
            "building",
            "natural place",
            "village",
            "animal",
            "plant",
            "album",
            "film",
            "written work",
        ),
        prefix="dbpedia_14",
    ),
    "amazon_polarity": classification(
        "fancyzhx/amazon_polarity",
        "9d9c45c18f8c3cf1b23a3c27917b60cbf28f3289",
        ("title", "content"),
        ("negative", "positive"),
        prefix="amazon_polarity",
    ),
}
