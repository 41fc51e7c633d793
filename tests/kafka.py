"""A Kafka cluster of the test's own: the one that librdkafka, the library of confluent-kafka, has for tests.

It lives in this process, and other processes reach it. It keeps topics, groups and what they have committed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import files

_PRODUCER = 0


class MockKafka:
    """servers: what clients are told."""

    def __init__(self) -> None:
        library = next(str(each.locate()) for each in files("confluent-kafka") or () if "librdkafka" in each.name)
        self._library = ctypes.CDLL(library)
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        for name, answer, arguments in (
            ("rd_kafka_conf_new", pointer, ()),
            ("rd_kafka_new", pointer, (number, pointer, text, ctypes.c_size_t)),
            ("rd_kafka_destroy", None, (pointer,)),
            ("rd_kafka_set_log_level", None, (pointer, number)),
            ("rd_kafka_mock_cluster_new", pointer, (pointer, number)),
            ("rd_kafka_mock_cluster_destroy", None, (pointer,)),
            ("rd_kafka_mock_cluster_bootstraps", text, (pointer,)),
            ("rd_kafka_mock_topic_create", number, (pointer, text, number, number)),
            ("rd_kafka_mock_broker_set_down", number, (pointer, ctypes.c_int32)),
            ("rd_kafka_mock_broker_set_up", number, (pointer, ctypes.c_int32)),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = answer, arguments
        failure = ctypes.create_string_buffer(512)
        self._client = self._library.rd_kafka_new(_PRODUCER, self._library.rd_kafka_conf_new(), failure, 512)
        assert self._client, failure.value
        self._library.rd_kafka_set_log_level(self._client, 0)
        self._cluster = self._library.rd_kafka_mock_cluster_new(self._client, 1)
        self.servers = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def make(self, topic: str, partitions: int = 1) -> None:
        """A topic, and that of its dead messages."""
        for name in (topic, f"{topic}.dead"):
            assert self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1) == 0

    def restart(self) -> None:
        """Every connection is cut, and new ones are taken again."""
        self._library.rd_kafka_mock_broker_set_down(self._cluster, 1)
        self._library.rd_kafka_mock_broker_set_up(self._cluster, 1)

    def close(self) -> None:
        self._library.rd_kafka_mock_cluster_destroy(self._cluster)
        self._library.rd_kafka_destroy(self._client)


@contextmanager
def mock_kafka() -> Iterator[MockKafka]:
    kafka = MockKafka()
    try:
        yield kafka
    finally:
        kafka.close()
