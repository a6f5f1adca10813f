"""Which keys are kept for which queries: ranks, thresholds at chunk boundaries, lists of live keys, and the slots after the call.

Candidates are the slots and then the tokens, in this order. A rank is a number of 63 bits that orders them by larger score, then later
position; 0 is no key. The kept keys of a prefix are those that reach its threshold, and a key that has left never returns, so that
each block of queries needs the keys that are live at its start and those of its own that enter.

B batch   T tokens   K kv heads   P head dimension   W window   S slots given, W or 0   C = S + T candidates
Q queries of a block (LISTED of them)   E = 2 LISTED entries of keys that enter or leave within the block
"""

import triton
import triton.language as tl


@triton.jit
def rank_of(score, position):
    """63 bits: 32 of the score in ascending order, 31 of the position."""
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(score != score, 0x7F800001, order)  # NaN comes first, as in a sort
    rank = ((order.to(tl.int64) + 2147483648) << 31) | (position.to(tl.int64) + 1)
    return tl.where(position < 0, 0, rank)


@triton.jit
def score_of(rank):
    """The score of a rank, but that -0.0 is 0.0."""
    order = ((rank >> 31) - 2147483648).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["T"])
def rank_candidates(
    score, slot_score, slot_position, position, valid, rank,
    score_b, score_t, score_k, slot_score_b, slot_score_k, slot_score_w, slot_position_b, slot_position_k, slot_position_w, T,
    K: tl.constexpr, S: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rank_BKC of slots and tokens; tokens that do not count are no keys. Grid: (ceil(C / BLOCK), K, B)."""
    b, kv = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = c - S
    count, first = T, 0
    if HAS_VALID:
        count = tl.minimum(T, tl.load(valid + b)).to(tl.int32)
    if S > 0:
        first = tl.load(position + b)
    value = tl.load(score + b * score_b + kv * score_k + t * score_t, mask=(t >= 0) & (t < T), other=0.0)
    found = rank_of(value, tl.where((t >= 0) & (t < count), first + t, -1))
    if S > 0:
        is_slot = c < S
        slot_value = tl.load(slot_score + b * slot_score_b + kv * slot_score_k + c * slot_score_w, mask=is_slot, other=0.0)
        slot_place = tl.load(slot_position + b * slot_position_b + kv * slot_position_k + c * slot_position_w, mask=is_slot, other=-1)
        found = tl.where(is_slot, rank_of(slot_value, slot_place), found)
    tl.store(rank + (b * K + kv) * (S + T) + c, found, mask=c < S + T)


@triton.jit
def _digits(rank, high, of_position):
    """The 32 bits searched for: of the score, or, among ranks of the score `high`, of the position."""
    score = ((rank >> 31) - 2147483648).to(tl.int32)
    return tl.where(of_position, tl.where(score == high, (rank & 0x7FFFFFFF).to(tl.int32), -1), score)


@triton.jit
def _tally(a, b, c, d, x, low, step):
    """Count those that reach low + i step, i = 1 .. 7, in halves of 16 bits."""
    a += (x >= _pivot(low, step)).to(tl.int32) + tl.where(x >= _pivot(low, 2 * step), 65536, 0)
    b += (x >= _pivot(low, 3 * step)).to(tl.int32) + tl.where(x >= _pivot(low, 4 * step), 65536, 0)
    c += (x >= _pivot(low, 5 * step)).to(tl.int32) + tl.where(x >= _pivot(low, 6 * step), 65536, 0)
    d += (x >= _pivot(low, 7 * step)).to(tl.int32)
    return a, b, c, d


@triton.jit
def _pivot(low, more):
    """Of 32 bits; no score or position reaches the largest of them."""
    return tl.minimum(low + more, 2147483647).to(tl.int32)


@triton.jit
def _total(halves):
    return tl.sum((halves & 0xFFFF).to(tl.int64) + ((halves >> 16).to(tl.int64) << 32), 0)


@triton.jit
def _quarters(a, b):
    """The four counts of two pairs in one sum, each of them below 2^16."""
    both = tl.sum((a.to(tl.int64) & 0xFFFFFFFF) + (b.to(tl.int64) << 32), 0)
    first, second = both & 0xFFFFFFFF, both >> 32
    return (first & 0xFFFF) | ((first >> 16) << 32), (second & 0xFFFF) | ((second >> 16) << 32)


@triton.jit
def _take(found, reach, above, count, step, need):
    """Move up to a pivot that enough ranks reach; `above` is how many reach the next one."""
    enough = count >= need
    return found + tl.where(enough, step, 0), tl.where(enough, count, reach), tl.where(enough, above, tl.maximum(above, count))


@triton.jit
def threshold_of(rank, end, need, low, high, BLOCK: tl.constexpr, FEW: tl.constexpr):
    """A rank that exactly min(need, n) of the n keys among the first `end` ranks reach.

    Keys, ranks above 0, lie between `low` and `high`. FEW: they are fewer than 2^15.
    """
    lane = tl.arange(0, BLOCK)
    some = tl.zeros((BLOCK,), tl.int32)
    for n in range(0, end, BLOCK):
        some += (tl.load(rank + n + lane, mask=n + lane < end, other=0) > 0).to(tl.int32)
    reach = tl.sum(some, 0).to(tl.int64)
    need = need.to(tl.int64)
    least = tl.full((), 1, tl.int64)
    above = tl.full((), 0, tl.int64)
    score = tl.full((), 0, tl.int32)
    for phase in range(2):
        # First by score; then, where several keys have the score of the threshold, the latest of them are kept.
        if (reach > need) & (need > 0):
            need -= above
            reach -= above
            above -= above
            start = tl.where(phase == 0, (low >> 31) - 2147483648, 0).to(tl.int64)
            width = tl.where(phase == 0, (high >> 31) - (low >> 31), 2147483647)
            shift = tl.full((), 29, tl.int32)
            while (shift >= 3) & ((width >> (shift - 3)) < 8):
                shift -= 3
            found = start
            while (shift >= 0) & (reach > need):
                step = tl.full((), 1, tl.int64) << shift
                a = tl.zeros((BLOCK,), tl.int32)
                b = tl.zeros((BLOCK,), tl.int32)
                c = tl.zeros((BLOCK,), tl.int32)
                d = tl.zeros((BLOCK,), tl.int32)
                for n in range(0, end, BLOCK):
                    x = tl.load(rank + n + lane, mask=n + lane < end, other=0)
                    a, b, c, d = _tally(a, b, c, d, _digits(x, score, phase == 1), found, step)
                if FEW:
                    ab, cd = _quarters(a, b)
                    ef, g = _quarters(c, d)
                else:
                    ab, cd, ef, g = _total(a), _total(b), _total(c), _total(d)
                found, reach, above = _take(found, reach, above, ab & 0xFFFFFFFF, step, need)
                found, reach, above = _take(found, reach, above, ab >> 32, step, need)
                found, reach, above = _take(found, reach, above, cd & 0xFFFFFFFF, step, need)
                found, reach, above = _take(found, reach, above, cd >> 32, step, need)
                found, reach, above = _take(found, reach, above, ef & 0xFFFFFFFF, step, need)
                found, reach, above = _take(found, reach, above, ef >> 32, step, need)
                found, reach, above = _take(found, reach, above, g & 0xFFFFFFFF, step, need)
                # The last pass looks at bits that the one before it has fixed in part.
                shift = tl.where(shift > 0, tl.maximum(shift - 3, 0), -1)
            if phase == 0:
                score = found.to(tl.int32)
                least = (found + 2147483648) << 31
            else:
                least = least | found
    return tl.where(need > 0, least, 9223372036854775807)


@triton.jit
def _live_chunk(rank, live, threshold, end, W: tl.constexpr, BLOCK: tl.constexpr):
    """Store the candidates before `end` that reach the threshold, in order; their number."""
    lane = tl.arange(0, BLOCK)
    count = 0
    for n in range(0, end, BLOCK):
        ok = tl.load(rank + n + lane, mask=n + lane < end, other=0) >= threshold
        place = count + tl.cumsum(ok.to(tl.int32), 0) - 1
        tl.store(live + place, n + lane, mask=ok & (place < W))
        count += tl.sum(ok.to(tl.int32), 0)
    return tl.minimum(count, W)


@triton.jit(do_not_specialize=["C", "CHUNKS"])
def live_at_chunks(
    rank, live, live_count, threshold, C, CHUNKS,
    K: tl.constexpr, W: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The keys kept before each chunk of CHUNK tokens, and after the last. Grid: (CHUNKS + 1, K, B).

    live is [B, K, CHUNKS + 1, W], live_count and threshold [B, K, CHUNKS + 1].
    """
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    row = tl.program_id(2).to(tl.int64) * K + tl.program_id(1)
    place = row * (CHUNKS + 1) + chunk
    rank += row * C
    end = tl.minimum(C, S + chunk * CHUNK)
    zero = tl.full((), 0, tl.int64)
    least = threshold_of(rank, end, tl.full((), W, tl.int64), zero, zero + 9223372036854775807, BLOCK, False)
    count = _live_chunk(rank, live + place * W, least, end, W, BLOCK)
    tl.store(live_count + place, count)
    tl.store(threshold + place, least)


@triton.jit
def _packed(first, second):
    """Two flags in the halves of 32 bits, so that one sum counts both; a tile has fewer than 2^15 of each."""
    return first.to(tl.int64) + (second.to(tl.int64) << 16)


@triton.jit
def _append(entry, bias, index, rank, whole, part, n_whole, n_part, E: tl.constexpr, W: tl.constexpr):
    """Add candidates to the two parts of a list."""
    LOG2E: tl.constexpr = 1.4426950408889634
    before = tl.cumsum(_packed(whole, part), 0)
    place = tl.where(whole, E + n_whole + (before & 0xFFFF).to(tl.int32) - 1, n_part + (before >> 16).to(tl.int32) - 1)
    ok = (whole & (place < E + W)) | (part & (place < E))
    tl.store(entry + place, index, mask=ok)
    tl.store(bias + place, score_of(rank) * LOG2E, mask=ok)


@triton.jit(do_not_specialize=["C", "CHUNKS"])
def list_live_keys(
    rank, live, live_count, threshold, entry, bias, leaves, count, open_rank, open_index, C, CHUNKS,
    K: tl.constexpr, W: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys that the queries of a block see. Grid: (blocks, K, B).

    entry and bias are [B, K, blocks, E + W rounded up to BLOCK_N]: from 0 on, keys seen by some of the queries, leaves [B, K, blocks, E]
    being the query before which each leaves; from E on, keys seen by all, filled up to a multiple of BLOCK_N with keys of bias -inf.
    count is [B, K, blocks, 2]: the numbers of both. bias is the score times log2(e). open_rank and open_index are [B, K, blocks, CHUNK].
    """
    E: tl.constexpr = 2 * LISTED
    EACH: tl.constexpr = E + (W + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    block = tl.program_id(0)
    row = tl.program_id(2).to(tl.int64) * K + tl.program_id(1)
    chunk = block * LISTED // CHUNK
    from_chunk = row * (CHUNKS + 1) + chunk
    to = row * tl.num_programs(0) + block
    rank += row * C
    live += from_chunk * W
    entry += to * EACH
    bias += to * EACH
    leaves += to * E
    open_rank += to * CHUNK
    open_index += to * CHUNK
    n_live = tl.load(live_count + from_chunk)
    start = S + chunk * CHUNK
    first = S + block * LISTED
    end = tl.minimum(C, first + LISTED)
    # Between the thresholds of the chunk's two ends lie the few keys whose fate within the chunk is open.
    low, high = tl.load(threshold + from_chunk), tl.load(threshold + from_chunk + 1)

    lane = tl.arange(0, BLOCK)
    n_part, n_whole, n_open, n_open_before = 0, 0, 0, 0
    for n in range(0, n_live + end - start, BLOCK):
        at = n + lane
        ok = at < n_live + end - start
        index = tl.where(at < n_live, tl.load(live + at, mask=at < n_live, other=0), start + at - n_live)
        found = tl.load(rank + index, mask=ok, other=0)
        sure, opens, before = found >= high, (found >= low) & (found < high), index < first
        whole, part = sure & before, sure & (index >= first)
        _append(entry, bias, index, found, whole, part, n_whole, n_part, E, W)
        place = n_open + tl.cumsum(opens.to(tl.int32), 0) - 1
        tl.store(open_rank + place, found, mask=opens & (place < CHUNK))
        tl.store(open_index + place, index, mask=opens & (place < CHUNK))
        counts = tl.sum(_packed(whole, part) + (_packed(opens, opens & before) << 32), 0)
        n_whole += (counts & 0xFFFF).to(tl.int32)
        n_part += ((counts >> 16) & 0xFFFF).to(tl.int32)
        n_open += ((counts >> 32) & 0xFFFF).to(tl.int32)
        n_open_before += (counts >> 48).to(tl.int32)
    n_open = tl.minimum(n_open, CHUNK)
    tl.debug_barrier()  # open keys are read by other threads

    at_start, at_end = low, high
    for time in range(2):  # a loop, so that the search is compiled once
        sure_then = n_whole + tl.where(time == 0, 0, n_part)
        open_then = tl.where(time == 0, n_open_before, n_open)
        at_end = tl.minimum(high, threshold_of(open_rank, open_then, W - sure_then, low, high, BLOCK, CHUNK < 32768))
        at_start = tl.where(time == 0, at_end, at_start)
    for n in range(0, n_open, BLOCK):
        index = tl.load(open_index + n + lane, mask=n + lane < n_open, other=0)
        found = tl.load(open_rank + n + lane, mask=n + lane < n_open, other=0)
        alive = found >= at_start
        whole = alive & (found >= at_end) & (index < first)
        part = alive & ((found < at_end) | (index >= first))
        _append(entry, bias, index, found, whole, part, n_whole, n_part, E, W)
        counts = tl.sum(_packed(whole, part), 0)
        n_whole += (counts & 0xFFFF).to(tl.int32)
        n_part += (counts >> 16).to(tl.int32)
    n_part, n_whole = tl.minimum(n_part, E), tl.minimum(n_whole, W)
    tl.store(count + to * 2, n_part)
    tl.store(count + to * 2 + 1, n_whole)
    fill_N = n_whole + tl.arange(0, BLOCK_N)
    filled_N = fill_N < (n_whole + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    tl.store(entry + E + fill_N, first, mask=filled_N)
    tl.store(bias + E + fill_N, float("-inf"), mask=filled_N)
    tl.debug_barrier()  # entries are read again, by other threads

    q_Q = tl.arange(0, BLOCK_Q)
    rank_Q = tl.load(rank + first + q_Q, mask=(q_Q < LISTED) & (first + q_Q < end), other=0)
    old = n_whole + _count_before(entry, n_part, first, BLOCK_D)
    for d in range(0, n_part, BLOCK_D):
        d_D = d + tl.arange(0, BLOCK_D)
        rank_D = tl.load(rank + tl.load(entry + d_D, mask=d_D < n_part, other=0), mask=d_D < n_part, other=0)
        # Keys that were kept at the start and are no better: they are all in this part, since whoever a leaving key beats leaves before it.
        worse_D = tl.zeros((BLOCK_D,), tl.int32)
        for e in range(0, n_part, BLOCK_D):
            e_D = e + tl.arange(0, BLOCK_D)
            index_D = tl.load(entry + e_D, mask=e_D < n_part, other=C)
            other_D = tl.load(rank + index_D, mask=index_D < first, other=9223372036854775807)
            worse_D += tl.sum((other_D[None, :] <= rank_D[:, None]).to(tl.int32), 1)
        better_DQ = (rank_Q[None, :] > rank_D[:, None]).to(tl.int32)
        stays_DQ = tl.cumsum(better_DQ, 1) < (W - old + worse_D)[:, None]
        leaves_D = tl.where(rank_D >= at_end, BLOCK_Q, tl.sum(stays_DQ.to(tl.int32), 1))
        tl.store(leaves + d_D, leaves_D, mask=d_D < n_part)


@triton.jit
def _count_before(entry, n_part, first, BLOCK: tl.constexpr):
    """How many entries of the first part were candidates before the block."""
    lane = tl.arange(0, BLOCK)
    some = tl.zeros((BLOCK,), tl.int32)
    for n in range(0, n_part, BLOCK):
        some += (tl.load(entry + n + lane, mask=n + lane < n_part, other=first) < first).to(tl.int32)
    return tl.sum(some, 0)
