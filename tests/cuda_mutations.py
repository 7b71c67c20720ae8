#!/usr/bin/env python3
"""Do the tests of the CUDA kernels notice mistakes?

Each mutation below is a mistake in rs-cuda.cu, and names the tests that must fail for it.  A text holds what is replaced between
[[ and ]]; it must occur once, so that a list which no longer fits the source fails.  All mutations of a test program are compiled
at once, each behind a condition, and one is chosen when the program runs: that is a compilation a program, not one a mutation.  With
none chosen the same tests must pass.

  cuda_mutations.py --cxx=CXX [--flags="..."] [--objects="a.o|b.o"] [--libraries="..."] [NAME...]

Lists have | between their elements.  NAME: a part of the names of mutations to try.
"""
import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parent.parent
RUN_LIMIT = 60  # seconds; a mutation that hangs until then is noticed, too, and said to hang

Mutation = collections.namedtuple("Mutation", "name program filter edits")


def mutation(name, tests, *edits):
    program, cases = tests
    return Mutation(name, program, cases, edits)


QUANTIZED = ("test_cuda_linear", "Seeds/CudaLinear.QuantizedEqualsTheCpuInEveryBit/0")
FLOATS = ("test_cuda_linear", "Seeds/CudaLinear.FloatsAreWithinWhatTheirPartsLeave/0")
ENDS = ("test_cuda_linear", "Seeds/CudaLinear.ActivationsResidualsAndHalves/0")
HALVES = ("test_cuda_linear", "Seeds/CudaLinear.HalvesStayFinite/0")
TILES = ("test_cuda_linear", "Seeds/CudaLinear.HalvesDoNotDependOnTilesNorBlocks/0")
WGMMA = ("test_cuda_wgmma", "Seeds/CudaLinearWgmma.QuantizedEqualsTheCpuInEveryBit/0")
FLASH = ("test_cuda_attention", "cuda_flash_attn.lengths_at_tile_edges:cuda_flash_attn.head_dims")
BEYOND = ("test_cuda_attention", "cuda_flash_attn.ragged_batch:cuda_flash_attn.head_dims")
LARGE = ("test_cuda_attention", "cuda_flash_attn.large_numbers")
WINDOWS = ("test_cuda_attention", "cuda_flash_attn.windows")
COLUMNS = ("test_cuda_attention", "cuda_attn_colsum.lengths_at_tile_edges")
COLUMN_WINDOWS = ("test_cuda_attention", "cuda_attn_colsum.windows")
ROPE_TABLE = ("test_cuda_rows", "Orders/Rows.RopeTable/1")
ROPE = ("test_cuda_rows", "Orders/Rows.RopeHasTheBitsOfTheCpu/1")
POOLED = ("test_cuda_attention", "cuda_attn_pool.near_f64")
DROP = ("test_cuda_drop", "Orders/Drop.KeepsWhatTheCpuKeeps/1")
GATHER = ("test_cuda_drop", "Orders/Drop.GatherAndRestore/1")
MERGE = ("test_cuda_drop", "Orders/Drop.AssignMergeAndSizes/1")
NORM = ("test_cuda_rows", "Orders/Rows.LayerNorm/1")
QUANTIZE_HALVES = ("test_cuda_rows", "Orders/Rows.QuantizeOfHalves/1")
QUANTIZE = ("test_cuda_rows", "Orders/Rows.QuantizeHasTheBitsOfTheReference/1")
POOL = ("test_cuda_rows", "Orders/Sequences.Pool/1")
SOURCES = ("test_cuda_backend", "CudaBackend.RowsOfASourceGoUpInParts")
STANDARDIZE = ("test_cuda_rows", "Orders/Sequences.Standardize/*")

MUTATIONS = [
    # ---- linear layers of 8 and 4 bits
    mutation("linear_quantized: no block_sync before a step", QUANTIZED, ("[[block_sync();]]  // step j is there for all", ";")),
    mutation("linear_quantized: rows' scales of one step are not waited for", TILES,
             ("if (steps == 1) [[block_sync();]]  // quants are there", ";")),
    mutation("linear_quantized: a copy is not waited for", QUANTIZED,
             ("[[cp_async_wait<tile::stages - 2>();]]", "cp_async_wait<tile::stages - 1>();")),
    mutation("linear_quantized: rows of x do not change places", QUANTIZED,
             ("p.x[half] = [[q_chunk(warp_m * Tile::tokens + lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2)]];",
              "(warp_m * Tile::tokens + lane / 16 * 8 + lane % 8) * step_k + 16 * (2 * half + lane / 8 % 2)")),
    mutation("linear_quantized: matrices 1 and 2 of x exchanged", QUANTIZED,
             ("p.x[half] = [[q_chunk(warp_m * Tile::tokens + lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2)]];",
              "q_chunk(warp_m * Tile::tokens + lane / 8 % 2 * 8 + lane % 8, 2 * half + lane / 16)")),
    mutation("linear_quantized: the other half of w", QUANTIZED,
             ("(stage + (at.w + (Four ? [[half]] : half * 2 + m) * 512))", "1 - half"),
             ("(stage + (at.w + (Four ? half : [[half * 2 + m]]) * 512))", "(1 - half) * 2 + m")),
    mutation("linear_quantized: the block of w behind", QUANTIZED,
             ("p.w = Tile::a_bytes + [[warp_n]] * (four", "(warp_n ^ 1)")),
    mutation("linear_quantized: the place of a stage too early", QUANTIZED,
             ("here = [[here + 1 == tile::stages ? 0 : here + 1]];", "here + 2 >= tile::stages ? 0 : here + 1")),
    mutation("linear_quantized: a step of w is left out", QUANTIZED,
             ("b += [[block_channels / warp_channels * piece_bytes<Four>]];", "2 * (block_channels / warp_channels) * piece_bytes<Four>")),
    mutation("linear_quantized: the same step of x", QUANTIZED, ("a += [[q_tile]];", "0")),
    mutation("linear_quantized: the last chunk of w4 is left out", QUANTIZED,
             ("[[i + thread_index() * 16 < tile::b_bytes]])", "i + thread_index() * 16 + 16 < tile::b_bytes")),
    mutation("linear_quantized: the next tile is the one behind", TILES, ("const int next = i + [[grid_x()]];", "1")),
    mutation("linear_quantized: no zero point", QUANTIZED,
             ("sum - [[static_cast<uint32_t>(x.zero) * static_cast<uint32_t>(colsum[j])]];", "0u")),
    mutation("linear_quantized: no scale of a row", QUANTIZED, ("* ([[x.scale * scale[j]]]) + bias[j];", "scale[j]")),
    mutation("linear_quantized: the scale of another token", QUANTIZED, ("x = warp_quants[[[thread_token(token)]]];", "thread_token(token ^ 1)")),
    mutation("linear_quantized: one wait_for_previous too few", QUANTIZED, ("if ([[first]]) wait_for_previous();", "false")),
    mutation("w4: shifted by 3 bits", QUANTIZED, ("([[sum[c] >> 4]])", "sum[c] >> 3")),
    mutation("w4: the low nibbles are the high ones", QUANTIZED, ("w[0][i] = unpack_nibbles(w[0][i], [[4]]);", "0")),
    mutation("w4: multipliers of the wrong channel", QUANTIZED, ("mult >> [[(i % 2 * 2 + c / 2)]] * 8", "(i % 2 * 2 + c % 2)")),
    mutation("w4: multipliers of the other group", QUANTIZED, ("(stage + (at.mult + [[half]] * 32))", "(1 - half)")),
    mutation("thread_sum: rows and columns exchanged", QUANTIZED, ("[[channel % 2 * 2 + i % 2]]];", "i % 2 * 2 + channel % 2")),
    mutation("thread_token: tokens exchanged", QUANTIZED, ("return [[i / 2 * 8 + lane_of() % 4 * 2 + i % 2]];", "i / 2 * 8 + i % 2 * 4 + lane_of() % 4")),
    mutation("store_any_tile: a row too many", QUANTIZED, ("if ([[row >= rows]]) continue;", "row > rows")),
    mutation("store_any_tile: a channel too many", QUANTIZED,
             ("const int count = [[e.channels - channel]];\n  float all", "e.channels - channel + 1")),
    mutation("store_tile: a row more than there is is whole", QUANTIZED,
             ("whole = wide && [[first_row + BM <= rows]] &&", "first_row + BM <= rows + 1")),
    mutation("store_whole_tile: rows in another order", TILES, ("y += [[(i % 2 ? 7 : 1)]] * e.stride;", "4")),
    mutation("store_whole_tile: the residual of another row", ENDS, ("from += [[(i % 2 ? 7 : 1)]] * e.residual_stride;", "4")),
    mutation("linear: no bias", QUANTIZED, ("bias[i] = [[e.bias && channel + i < e.channels]] ?", "false")),
    mutation("store_any_tile: no residual", ENDS,
             ("if ([[e.residual]]) v[j] = residual[j] + v[j];", "static_cast<const float *>(nullptr)")),
    mutation("store_any_tile: the residual's rows are the result's", ENDS,
             ("e.residual + [[row * e.residual_stride]] + channel", "row * e.stride")),
    mutation("store_any_tile: activation after the residual", ENDS,
             ("v[j] = [[activate(e.act, e.half, all[i][j])]];", "e.residual ? all[i][j] : activate(e.act, e.half, all[i][j])")),
    mutation("store_any_tile: another GELU than that of whole tiles", TILES,
             ("v[j] = [[activate(e.act, e.half, all[i][j])]];", "activate(e.act, false, all[i][j])")),
    mutation("wgmma: copies without a fence", WGMMA, ("if (tile::together) [[fence_shared();]]", ";")),
    mutation("wgmma: registers without a fence", WGMMA, ("[[multiply_begin(acc);]]\n  RS_UNROLL", ";")),
    mutation("wgmma: not waited for", WGMMA, ("stage + (warp_m * 64 * step_k + i / 2 * 32));\n  [[multiply_end(acc);]]", ";")),
    mutation("wgmma: the tokens of the other warps", WGMMA, ("stage + ([[warp_m]] * 64 * step_k + i / 2 * 32)", "(1 - warp_m)")),
    mutation("wgmma: the first half of a step twice", WGMMA, ("stage + (warp_m * 64 * step_k + [[i / 2 * 32]])", "0")),
    mutation("halves: infinite where they do not fit", HALVES, ("[[make_uint2(pack_finite_f16(v[0], v[1]), pack_finite_f16(v[2], v[3]))]];", "make_uint2(pack_f16(v[0], v[1]), pack_f16(v[2], v[3]))")),
    # ---- linear layers of floats
    mutation("linear_float: no block_sync before a step", FLOATS, ("cp_async_wait<float_stages - 2>();\n    [[block_sync();]]", ";")),
    mutation("linear_float: a copy is not waited for", FLOATS,
             ("[[cp_async_wait<float_stages - 2>();]]", "cp_async_wait<float_stages - 1>();")),
    mutation("linear_float: copies of x do not change places", FLOATS,
             ("to = stage + [[float_chunk(row, chunk)]];", "row * 128 + 16 * chunk")),
    mutation("linear_float: the low part of x is left out", FLOATS, ("[[mma_bf16(acc[m][n], wh, low[n]);]]", ";")),
    mutation("linear_float: g and t exchanged in x", FLOATS,
             ("float_chunk([[warp_m * 32 + n * 8 + g]], half * 4 + t)", "warp_m * 32 + n * 8 + (g ^ 1)")),
    mutation("linear_float: no zeros behind the columns", FLOATS, ("cp_async16(to, from, [[there * 4]]);", "16")),
    mutation("linear_float: a column too many", FLOATS, ("there > 0 ? from[0] : 0, [[there > 1]] ? from[1]", "there > 0")),
    # ---- attention
    mutation("flash_attn: no block_sync before a tile", FLASH, ("[[block_sync();]]  // this tile is there", ";")),
    mutation("flash_attn: no block_sync before queries are read", FLASH,
             ("cp_async_wait<1>();\n  [[block_sync();]]\n  uint32_t q[D / 16][4];", ";")),
    mutation("flash_attn: queries are not waited for", FLASH,
             ("[[cp_async_wait<1>();]]\n  block_sync();\n  uint32_t q[D / 16][4];", "cp_async_wait<2>();")),
    mutation("flash_attn: keys are not waited for", FLASH,
             ("[[cp_async_wait<0>();]]\n    block_sync();  // this tile is there", "cp_async_wait<1>();")),
    mutation("flash_attn: a key too many", FLASH, ("if ([[column >= n]] ||", "column > n")),
    mutation("flash_attn: causal queries see the next key", WINDOWS, ("|| [[from_here > a.ahead]]) s[i][j]", "from_here > a.ahead + 1")),
    mutation("flash_attn: windows one key too wide", WINDOWS, ("|| [[from_here < -a.behind]] ||", "from_here < -a.behind - 1")),
    mutation("flash_attn: tiles that a window ends in are not masked", WINDOWS, ("|| [[key < warp_last - a.behind]])", "false")),
    mutation("flash_attn: sums are not rescaled", FLASH, ("[[o[i][j] *= keep[j / 2];]]", ";")),
    mutation("flash_attn: rows rescaled by each other's factor", FLASH, ("[[o[i][j] *= keep[j / 2];]]", "o[i][j] *= keep[j % 2];")),
    mutation("flash_attn: sizes of keys exchanged", FLASH, ("return [[c ? l.y : l.x]];", "c ? l.x : l.y")),
    mutation("flash_attn: large scores as small ones", LARGE, ("const bool fits = [[fmaxf(fabsf(base[0]), fabsf(base[1])) < 65536]];", "true")),
    mutation("flash_attn: values of other rows", FLASH, ("low[2] = {r[0], [[r[1]]]}, high[2] = {r[2], r[3]};", "r[2]")),
    mutation("flash_attn: halves beyond the largest", ("test_cuda_attention", "cuda_flash_attn.halves_stay_finite"),
             ("halves = [[pack_finite_f16(v.x, v.y)]];", "pack_f16(v.x, v.y)")),
    mutation("flash_attn: halves of the wrong column", ("test_cuda_attention", "cuda_flash_attn.a_result_of_halves*"),
             ("to[1] = static_cast<uint16_t>([[halves >> 16]]);", "halves")),
    mutation("attention: copies do not change places", FLASH, ("at = to + [[place[chunk / 2]]];", "row * D + chunk * 8")),
    mutation("attention: no zeros behind a sequence", BEYOND, ("[[row + i < there ? bytes : 0]]);", "bytes")),
    mutation("attention: no zeros behind a head", BEYOND, ("bytes = [[chunk < there_chunks ? 16 : 0]];", "16")),
    mutation("attn_colsum: no block_sync before a tile", COLUMNS,
             ("cp_async_wait<0>();\n    [[block_sync();]]\n    if (query + rows < end)", ";")),
    mutation("attn_colsum: queries of a tile before the window", COLUMN_WINDOWS,
             ("first_query = [[larger(0, tile.first - a.ahead)]] / rows", "larger(0, tile.first + 15 - a.ahead)")),
    mutation("attn_colsum: queries end before the window does", COLUMN_WINDOWS,
             ("end = [[smaller(n - 1, last + a.behind)]] + 1;\n  const shared<uint16_t> tiles = block_memory<uint16_t>(0);\n"
              "  const shared<attn_sum>", "smaller(n - 1, last + a.behind - 1)")),
    mutation("attn_colsum: windows one query too wide", COLUMN_WINDOWS, ("|| [[from_there > a.ahead]])) continue;", "from_there > a.ahead + 1")),
    mutation("attn_colsum: tiles that a window ends in are not masked", COLUMN_WINDOWS,
             ("all_seen = [[warp_first + 15 - query <= a.ahead]] &&", "true")),
    mutation("attn_first: the whole sequence is seen", COLUMN_WINDOWS, ("seen = [[smaller(n - 1, ahead) + 1]];", "n")),
    mutation("attn_colsum: a query too many", COLUMNS, ("[[at < n]] ? a.sums[", "at <= n")),
    mutation("one query: no block_sync in a reduction", POOLED,
             ("parts[warp_of()] = v;\n  [[block_sync();]]\n  v = parts[0];", ";")),
    mutation("attn_pool: no block_sync before sums are read", POOLED, ("[[block_sync();]]\n    if (thread_index() < there) {", ";")),
    mutation("attn_pool: a key too many", POOLED, ("[[i < n]]; i += one_query_warps)\n      for", "i <= n")),
    # ---- rows
    mutation("quantize: halves away from zero", QUANTIZE, ("float_to_bits([[step + whole]])", "floorf(step + 0.5f) + whole")),
    mutation("quantize: zero point cut off", QUANTIZE, ("static_cast<int32_t>([[rintf(-low / scale)]])}", "-low / scale")),
    mutation("quantize: divided, not multiplied", QUANTIZE, ("inverse = shows ? 0 : [[1 / to.scale]],", "1 / (to.scale * (1 + FLT_EPSILON))")),
    mutation("quantize: zeros behind a row, not the zero point", QUANTIZE, ("q[place(j)] = static_cast<uint8_t>([[to.zero]]);", "0")),
    mutation("quantize: rows do not change places", QUANTIZE, ("q_tile + [[q_chunk(in_tile, j / 16 % 4)]] + j % 16", "in_tile * q_columns + j / 16 % 4 * 16")),
    mutation("quantize: NaN is passed over", QUANTIZE, ("high = [[max_or_nan(high, v.v[i])]];", "fmaxf(high, v.v[i])"),
             ("low = [[min_or_nan(low, v.v[i])]],", "fminf(low, v.v[i])")),
    mutation("quantize: halves exchanged", QUANTIZE_HALVES, ("f16_to_float(static_cast<uint16_t>(v.y)), f16_to_float(static_cast<uint16_t>([[v.y >> 16]]))", "v.x >> 16")),
    mutation("layer_norm: no residual", NORM, ("if ([[a.residual]]) {", "static_cast<const float *>(nullptr)")),
    mutation("layer_norm: no eps", NORM, ("/ n + [[a.eps]]);", "0.0f")),
    mutation("layer_norm: a row too many", NORM,
             ("if ([[r >= *a.rows]]) return;\n  row_in_registers<count, full> row;\n  layer_norm_row", "r > *a.rows")),
    mutation("pool: a maximum passes over NaN", POOL, ("y = [[v > y || v != v]] ? v : y;", "v > y")),
    mutation("pool: a row of the next sequence", POOL,
             ("n = [[a.cu[b + 1] - first]];\n  float y = 0;", "a.cu[b + 1] - first + 1")),
    mutation("block_sum: no block_sync before writes", STANDARDIZE, ("[[block_sync();]]  // whoever still reads the sum", ";")),
    mutation("block_sum: no block_sync before reads", STANDARDIZE, ("[[block_sync();]]\n  double sum = 0;", ";")),
    mutation("rope_table: sines of the quarter before", ROPE_TABLE, ("*sine = [[quarter & 2]] ?", "(quarter + 1) & 2")),
    mutation("rope_table: cosines and sines exchanged", ROPE_TABLE, ("static_cast<float>([[quarter & 1 ? s : c]])", "quarter & 1 ? c : s")),
    mutation("rope_table: pi / 2 in one part", ROPE_TABLE, ("- turns * [[0x1.10b4611a62633p-30]]", "0.0")),
    mutation("rope_table: an angle too many", ROPE_TABLE, ("[[j < a.half]]; j += warp_size)", "j <= a.half")),
    mutation("rope: the second half turned the other way", ROPE, ("v.v[i] = [[second ? kept + turned : kept - turned]];", "kept - turned")),
    mutation("rope: columns behind the angles are turned", ROPE, ("if ([[angle < a.half]]) {\n      const bool second", "angle <= a.half")),
    mutation("rope: halves of another head", ROPE, ("column = [[j % a.d]], angle", "j % (2 * a.d)")),
    mutation("rope: halves beyond f16 become infinite", ROPE, ("pack_f16([[within_f16(v.v[i])]], 0));\n      store(y", "v.v[i]")),
    # ---- token dropping
    mutation("token_drop: of equal scores the last", DROP, ("static_cast<uint64_t>([[INT32_MAX - position]]);", "position")),
    mutation("token_drop: two zeros", DROP, ("[[score += 0.0f;]]  // one zero", ";")),
    mutation("token_drop: negative scores the wrong way round", DROP, ("[[bits >> 31 ? ~bits : bits | 1u << 31]]", "bits ^ 1u << 31")),
    mutation("token_drop: digits from the lowest on", DROP, ("mine += counts[[[255 - 8 * lane - k]]];", "8 * lane + k")),
    mutation("token_drop: no block_sync before counting", DROP, ("counts[thread_index()] = 0;\n      [[block_sync();]]", ";")),
    mutation("token_drop: no block_sync behind counting", DROP, ("[[block_sync();]]\n      if (warp == 0) {", ";")),
    mutation("token_drop: no block_sync before the digit is read", DROP, ("[[block_sync();]]\n      const int digit = chosen[0]", ";")),
    mutation("token_drop: no block_sync before places are read", DROP, ("[[block_sync();]]\n  int at = to;", ";")),
    mutation("token_drop: places one too far", DROP, ("count_bits(some & [[((1u << lane) - 1)]])]", "((2u << lane) - 1)")),
    mutation("token_drop: a key too many", DROP,
             ("in = [[i < last && key_of(i) >= least]];\n    const uint32_t some = ballot(in);\n    if (in) a.out",
              "i < last && key_of(i) + 1 >= least")),
    mutation("token_gather: the row before", GATHER, ("copy_row<N>(a.x + [[a.kept[r].before]] * a.ldx", "larger(a.kept[r].before - 1, 0)")),
    mutation("token_gather: rows of the input, not of the level before", GATHER,
             ("copy_row<N>(a.x + [[a.kept[r].before]] * a.ldx", "a.kept[r].origin")),
    mutation("copy_row: a piece is left out", GATHER, ("if ([[j + i * step < n]]) store(", "j + i * step + N < n")),
    mutation("token_restore: the kept row behind", GATHER, ("return [[a.kept[i].before < r]]; });", "a.kept[i].before <= r")),
    mutation("token_assign: no block_sync before it is known what is open", MERGE,
             ("[[block_sync();]]\n    const int open = any[0] | any[1];", ";")),
    mutation("token_assign: no block_sync before the next sequence", MERGE, ("[[block_sync();]]  // before the next sequence", ";")),
    mutation("token_assign: no block_sync before products", MERGE,
             ("[[block_sync();]]\n        for (int column = 0; column < assign_k / 4; column++) {", ";")),
    mutation("token_assign: of equal ones the last", MERGE, ("(other == like && [[place < at]]))", "place > at")),
    mutation("token_merge: its own row twice", MERGE, ("if ([[own >= base && own < base + warp_size]]) mask &=", "false")),

    # ---- the host's part
    mutation("sources: every part in the first one's place", SOURCES,
             ("at = u.begin + [[static_cast<size_t>(first) * u.row]];", "size_t(0)")),
    mutation("sources: a row of a part is not copied", SOURCES, ("[[static_cast<size_t>(n) * u.row]],", "static_cast<size_t>(n - 1) * u.row")),
    mutation("sources: parts of half as many rows", SOURCES, ("std::max<size_t>(1, [[upload_part / u.row]])", "upload_part / u.row / 2")),
    mutation("sources: in the place of another input", SOURCES, ("u = {s, [[l.inputs.at(input.id)]],", "l.inputs.begin()->second + 256")),
    mutation("sources: written once, when the run is recorded", SOURCES,
             ("[[RS_TRY(upload_sources(s, r, run.layout, error));]]", "if (!run.exec) RS_TRY(upload_sources(s, r, run.layout, error));")),
    mutation("sources: the copy of a run has what lies before them only in part", SOURCES,
             ("(from_source ? l.upload_bytes : l.recorded_bytes) = [[at]];", "from_source ? at : at - at / 4")),
]


def locate(text, source, name):
    """Where the marked part of a text is in the source."""
    begin, end = text.index("[["), text.rindex("]]")
    # "x[[[i]]]" is x[ with i marked: the marks are the inner two of three.
    while text[begin + 2:begin + 3] == "[":
        begin += 1
    while text[end - 1:end] == "]" and text[begin + 2:end].count("[") < text[begin + 2:end].count("]"):
        end -= 1
    old = text[begin + 2:end]
    whole = text[:begin] + old + text[end + 2:]
    found = source.count(whole)
    if found != 1:
        raise SystemExit(f"{name}: {whole!r} occurs {found} times in rs-cuda.cu, not once: the list of mutations is out of date")
    at = source.index(whole) + begin
    return at, at + len(old)


def mutate(source, mutations):
    """The source with all mutations in it; RS_MUTATION, from 1 on, chooses one when it runs."""
    places = collections.defaultdict(list)
    for number, m in enumerate(mutations, 1):
        for text, new in m.edits:
            places[locate(text, source, m.name)].append((number, new))
    result, last = [], 0
    for (begin, end), choices in sorted(places.items()):
        if begin < last:
            raise SystemExit(f"{mutations[choices[0][0] - 1].name}: lies within another mutation")
        old = source[begin:end]
        if old.endswith(";"):
            text = "{ " + " ".join(f"if (rs_mutation == {n}) {{ {new} }} else" for n, new in choices) + f" {{ {old} }} }}"
        else:
            text = "(" + " ".join(f"rs_mutation == {n} ? ({new}) :" for n, new in choices) + f" ({old}))"
        result += [source[last:begin], text]
        last = end
    head = ('#include <cstdlib>\nstatic const int rs_mutation = std::getenv("RS_MUTATION") ? std::atoi(std::getenv("RS_MUTATION")) : 0;'
            '\n#line 1 "rs-cuda.cu"\n')
    return head + "".join(result) + source[last:]


def build(program, mutations, folder, options):
    """Compiles a test program in a tree of links in which rs-cuda.cu alone is a file of its own."""
    tree = folder / program
    (tree / "tests").mkdir(parents=True)
    for path in SOURCE.glob("*.h"):
        (tree / path.name).symlink_to(path)
    (tree / "models").symlink_to(SOURCE / "models")
    (tree / "tools").symlink_to(SOURCE / "tools")
    for path in (SOURCE / "tests").iterdir():
        (tree / "tests" / path.name).symlink_to(path)
    (tree / "rs-cuda.cu").write_text(mutate((SOURCE / "rs-cuda.cu").read_text(), mutations))
    out = tree / program
    # -O1: compiled in half the time of -O3, and runs long enough to want more than -O0.
    command = [options.cxx, *options.flags, "-w", "-O1", "-g0", "-I", str(tree), str(tree / "tests" / (program + ".cpp")),
               *options.objects, *options.libraries, "-o", str(out)]
    begin = time.monotonic()
    r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if r.returncode:
        raise SystemExit(f"{program} does not compile:\n{shlex.join(command)}\n{r.stdout[-4000:]}")
    return out, time.monotonic() - begin


def run(program, number, cases):
    """-> (exit status or None at the time limit, seconds, output)"""
    environment = dict(os.environ, RS_MUTATION=str(number))
    # The first failure ends a test, and the first test that fails ends the run.
    command = [str(program), "--gtest_filter=" + cases, "--gtest_throw_on_failure", "--gtest_fail_fast", "--gtest_brief=1"]
    begin = time.monotonic()
    try:
        r = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                           timeout=RUN_LIMIT)
    except subprocess.TimeoutExpired:
        return None, time.monotonic() - begin, ""
    return r.returncode, time.monotonic() - begin, r.stdout


def said(status, output):
    """What noticed it, in a few words."""
    if status is None:
        return "hangs"
    if m := re.search(r"(race on|read of uninitialised|\w+ of shared memory in flight|access outside of|misaligned access of"
                      r"|mismatched collectives|divergent barrier|thread \d+ returns with a cp_async16|beside)[^\n:]*", output):
        return "fault: " + m.group()
    if "Failure" in output:
        return "values"
    return f"signal {-status}" if status < 0 else f"status {status}"


def split(text):
    return [part for part in text.split("|") if part]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cxx", default=os.environ.get("CXX", "c++"))
    parser.add_argument("--flags", type=split, default=["-std=c++17"])
    parser.add_argument("--objects", type=split, default=[])
    parser.add_argument("--libraries", type=split, default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.names or any(n in m.name for n in options.names)]
    by_program = collections.OrderedDict()
    for m in chosen:
        by_program.setdefault(m.program, []).append(m)

    folder = pathlib.Path(tempfile.mkdtemp(prefix="rs-mutations-"))
    wrong = []
    try:
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            builds = {p: pool.submit(build, p, ms, folder, options) for p, ms in by_program.items()}
            sound, tries = {}, []
            for program, mutations in by_program.items():
                path, seconds = builds[program].result()
                print(f"{program}: {len(mutations)} mutations compiled in {seconds:.0f} s", flush=True)
                for cases in sorted({m.filter for m in mutations}):
                    sound[program, cases] = pool.submit(run, path, 0, cases)
                for number, m in enumerate(mutations, 1):
                    tries.append((m, pool.submit(run, path, number, m.filter)))
            for (program, cases), future in sound.items():
                status, seconds, output = future.result()
                if status != 0 or "[  PASSED  ] 0 tests" in output:
                    wrong.append(f"without a mutation, {program} {cases} " + ("runs no test" if status == 0 else "fails"))
                    print(output[-2000:])
                else:
                    print(f"sound: {program} {cases}: {seconds:.1f} s")
            width = max(len(m.name) for m in chosen)
            print(f"\n{'mutation':{width}} | {'caught by':78} | seconds")
            for m, future in tries:
                status, seconds, output = future.result()
                caught = "SURVIVED" if status == 0 else f"{m.filter.split(':')[0]}: {said(status, output)}"
                if status == 0:
                    wrong.append(f"'{m.name}' survived {m.program} {m.filter}")
                print(f"{m.name:{width}} | {caught[:110]:78} | {seconds:5.1f}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{len(chosen)} mutations, {len(wrong)} not as they should be")
    for line in wrong:
        print("  " + line)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
