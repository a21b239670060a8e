"""The way to the Redis server that the balancers of a cluster share. Whatever goes wrong is one LinkError in words.

All that is there begins with `lb:{CLUSTER}:`, and goes by itself when no member tells it again. What several may change
at the same moment is changed by scripts, which Redis runs one after another; time is the server's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import unquote, urlsplit

from redis import Redis
from redis.backoff import NoBackoff
from redis.client import PubSub
from redis.commands.core import Script
from redis.retry import Retry

from balancer.filters.sharedlimit import ACTIVE, Charge, Settled
from balancer.protocol.texts import shown

T = TypeVar("T")

ANSWER_SECONDS = 1.0  # for a connection, and for an answer
MEMBER_SECONDS = 3.0  # that a member is known after its last beat
KEPT_SECONDS = 7 * 86400  # of what was decided, after the last beat of all
MESSAGE_KEPT = 200  # characters of what a server says
NANO = 1000  # nanoseconds per microsecond, in which Redis has its time

# KEYS: figures of members, when each was seen, the revision of decisions, these. ARGV: member, its figures, seconds to
# be known, and to keep decisions.
BEAT = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now, ARGV[1])
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now - ARGV[3])) do
    redis.call('HDEL', KEYS[1], gone)
    redis.call('ZREM', KEYS[2], gone)
end
for place, key in ipairs(KEYS) do redis.call('EXPIRE', key, place < 3 and 60 or ARGV[4]) end
return {tostring(now), redis.call('GET', KEYS[3]) or '', redis.call('HGETALL', KEYS[1]),
        redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')}
"""
# KEYS: decisions, their revision. ARGV: channel, seconds to keep them; then about what, and the word on it. The later
# word counts, which is the greater text, and any counts more than what is no word.
WRITE = """
local written, beginning = 0, '^[0-4]' .. string.rep('%d', 9) .. '%.' .. string.rep('%d', 6) .. ' '
for at = 3, #ARGV, 2 do
    local known = redis.call('HGET', KEYS[1], ARGV[at])
    if not known or known < ARGV[at + 1] or not string.find(known, beginning) then
        redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
        written = written + 1
    end
end
if written > 0 then
    redis.call('PUBLISH', ARGV[1], 'decided ' .. redis.call('INCR', KEYS[2]))
    for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, ARGV[2]) end
end
return written
"""
# The generic cell rate algorithm, as in filters/limit. KEYS: one for each charge, a hash: '' has when it owes nothing,
# each member when it last took something; whatever else is there is as nothing. ARGV: member, microseconds that this
# counts; then of each charge, in microseconds, the price and the most to owe, and how many requests.
CHARGE = """
local time, settled = redis.call('TIME'), {}
local now = time[1] * 1000000 + time[2]
for place, key in ipairs(KEYS) do
    local price, most, taken = tonumber(ARGV[3 * place]), tonumber(ARGV[3 * place + 1]), tonumber(ARGV[3 * place + 2])
    local clear, sharing, known = now, 1, redis.pcall('HGETALL', key)
    if known.err then redis.call('DEL', key) end
    for at = 1, #known, 2 do
        local value = tonumber(known[at + 1]) or 0
        if known[at] == '' then
            clear = math.max(clear, value)
        elseif known[at] ~= ARGV[1] then
            if value + ARGV[2] > now then sharing = sharing + 1 else redis.call('HDEL', key, known[at]) end
        end
    end
    clear = math.min(clear + price * taken, now + most)
    redis.call('HSET', key, '', string.format('%.0f', clear))
    if taken > 0 then redis.call('HSET', key, ARGV[1], string.format('%.0f', now)) end
    redis.call('PEXPIRE', key, math.ceil((clear - now + ARGV[2]) / 1000))
    settled[2 * place - 1], settled[2 * place] = math.ceil(clear - now), sharing
end
return settled
"""


class LinkError(Exception):
    """In words, without a password."""


class Beat(NamedTuple):
    """`members` by their names: what each tells of itself, and how many seconds ago."""

    revision: str
    members: Mapping[str, tuple[str, float]]


class Link:
    """For one thread, but for `abort`. `open` comes first, `close` last, and both may be called again."""

    def __init__(self, url: str, cluster: str, name: str) -> None:
        self.address = _without_password(url)
        self._url = url
        self._secret = unquote(urlsplit(url).password or "")
        self._name = name
        self._prefix = f"lb:{{{cluster}}}:"  # in braces: of one slot in a Redis Cluster
        self._channel = self._prefix + "news"
        self._is_aborted = False
        self._redis: Redis | None = None
        self._news: PubSub | None = None

    def open(self) -> None:
        """Connect, and listen to the others."""
        self._is_aborted = False
        self._redis = Redis.from_url(
            self._url,
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),  # who calls knows better when
            protocol=2,
            decode_responses=True,
            encoding_errors="replace",
        )
        self._call(self._redis.ping)  # whatever is wrong is told more plainly than to a script
        beat, write, charge = (self._redis.register_script(text) for text in (BEAT, WRITE, CHARGE))
        self._beat, self._write, self._charge = beat, write, charge
        self._news = PubSub(self._redis.connection_pool, ignore_subscribe_messages=True)
        self._call(self._news.subscribe, self._channel)

    def close(self) -> None:
        client, news, self._redis, self._news = self._redis, self._news, None, None
        for each in (news, client):
            if each is not None:
                with suppress(LinkError):
                    self._call(each.close)

    def abort(self) -> None:
        """From any thread: whatever it waits for fails."""
        self._is_aborted = True
        if (client := self._redis) is not None:
            with suppress(LinkError):
                self._call(client.connection_pool.disconnect)

    def beat(self, figures: str) -> Beat:
        keys = self._keys("members", "seen", "revision", "decisions")
        arguments = [self._name, figures, MEMBER_SECONDS, KEPT_SECONDS]
        now, revision, told, seen = self._run(self._beat, keys, arguments)
        texts, times = _pairs(told), _pairs(seen)
        ages = {name: float(now) - float(at) for name, at in times.items()}
        return Beat(revision, {name: (texts[name], age) for name, age in ages.items() if name in texts})

    def leave(self) -> None:
        """The others know at once that this one is gone."""
        assert self._redis is not None
        figures, seen = self._keys("members", "seen")
        self._call(self._redis.hdel, figures, self._name)
        self._call(self._redis.zrem, seen, self._name)

    def decided(self) -> tuple[str, dict[str, str]]:
        """(revision, the last word on each)."""
        assert self._redis is not None
        revision, decisions = self._keys("revision", "decisions")
        pipeline = self._redis.pipeline(transaction=True)
        pipeline.get(revision)
        pipeline.hgetall(decisions)
        number, words = self._call(pipeline.execute)
        return number or "", words

    def write(self, words: Mapping[str, str]) -> None:
        pairs = [text for pair in words.items() for text in pair]
        self._run(self._write, self._keys("decisions", "revision"), [self._channel, KEPT_SECONDS, *pairs])

    def charge(self, process: str, charges: Sequence[Charge]) -> list[Settled]:
        """`process` of this member has taken that."""
        keys = self._keys(*(f"limit:{each.limit}:{each.key}" for each in charges))
        amounts = [each for one in charges for each in (one.price / NANO, one.most / NANO, one.taken)]
        told = self._run(self._charge, keys, [self._name + process, ACTIVE // NANO, *amounts])
        return [Settled(owed * NANO, sharing) for owed, sharing in zip(told[::2], told[1::2], strict=True)]

    def tell(self, news: str) -> None:
        assert self._redis is not None
        self._call(self._redis.publish, self._channel, news)

    def wait(self, seconds: float) -> str | None:
        """News of the others, if there are any by then."""
        assert self._news is not None
        message = self._call(self._news.get_message, timeout=seconds)
        return message["data"] if message else None

    def _keys(self, *names: str) -> list[str]:
        return [self._prefix + name for name in names]

    def _run(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        return self._call(script, keys=keys, args=arguments)

    def _call(self, do: Callable[..., T], *arguments: Any, **named: Any) -> T:
        try:
            return do(*arguments, **named)
        except Exception as error:  # of many kinds, if it is no Redis that answers
            text = "no whole answer came in time" if self._is_aborted else str(error) or type(error).__name__
            if self._secret:  # whoever answers may repeat what was sent
                text = text.replace(self._secret, "***")
            raise LinkError(shown(text, MESSAGE_KEPT)) from None


def _pairs(flat: Sequence[str]) -> dict[str, str]:
    return cast(dict[str, str], dict(zip(flat[::2], flat[1::2], strict=True)))


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
