#!/usr/bin/env python3
"""What the CUDA kernels take of a multiprocessor, against what rs-cuda.cu says beside them.

    // budget: registers 168, shared 49152, spills 0

stands above a kernel: the most registers of any of its instances on any architecture, the most bytes of shared memory that a launch
asks for, and bytes that are spilled.  Fails where a kernel takes more than that or spills without a budget that says so, where a hot
kernel has no budget, and where an architecture is missing in the binary.  Skips where there is no nvcc.

  cuda_gate.py [--architectures "80-real|...|90-virtual"] [--flags "..."] [--library librs-cuda.so]
"""
import argparse
import collections
import concurrent.futures
import os
import pathlib
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time

SOURCE = pathlib.Path(__file__).resolve().parent.parent

# Where the time of a run goes: these have a budget.
HOT = ("linear_quantized linear_float flash_attn_kernel attn_columns_kernel attn_halves_kernel attn_pool_kernel layer_norm_registers "
       "layer_norm_shared quantize_halves quantize_registers quantize_shared token_drop_kernel token_gather_kernel token_assign_kernel "
       "token_merge_kernel").split()

# Of a multiprocessor, by compute capability: threads, blocks, bytes of shared memory (of which each block takes 1 KiB for itself).
Machine = collections.namedtuple("Machine", "threads blocks shared")
MACHINES = {80: Machine(2048, 32, 164 << 10), 86: Machine(1536, 16, 100 << 10), 89: Machine(1536, 24, 100 << 10),
            90: Machine(2048, 32, 228 << 10)}
REGISTERS = 65536

# What launches ask for, by the arguments of a kernel's template: a text of the launch that must be in rs-cuda.cu, and its bytes.
# Of what is not here, the budget's own number counts.
LAUNCHES = {
    "linear_quantized": ("tile::bytes, linear_quantized<Four, BM, BN>",
                         lambda four, bm, bn: bm * 8 + 3 * (bm * 64 + bn // 32 * (1088 if four else 2048))),
    "linear_float": ("float_bytes, linear_float", lambda: 3 * (64 * 32 * 4 + 64 * 32 * 4)),
    "flash_attn_kernel": ("attn_shared<d, true>, flash_attn_kernel<d, true>",
                          lambda d, values: 2 * (4 * d + 4 if values else 2 * d + 8) * (32 if values and d > 64 else 64)),
    "attn_columns_kernel": ("attn_shared<d, false>, attn_columns_kernel<d>", lambda d: 2 * (2 * d + 8) * 64),
    "attn_halves_kernel": ("256, 0, attn_halves_kernel", lambda: 0),
    "attn_pool_kernel": ("pool_shared, attn_pool_kernel", lambda: (32 + 8 * 128) * 4),
    "layer_norm_registers": ("RS_HELD_IN_REGISTERS(layer_norm_registers, rows)", lambda count, full: 0),
    "quantize_halves": ("quantize_halves<count, true> : quantize_halves<count, false>", lambda count, full: 0),
    "quantize_registers": ("RS_HELD_IN_REGISTERS(quantize_registers, x.capacity)", lambda count, full: 0),
    # One row where it takes more than half of what a block gets as a rule: shared_most.
    "layer_norm_shared": ("plan.bytes,\n                        fours ? layer_norm_shared<4>", lambda n: 96 << 10),
    "quantize_shared": ("plan.bytes,\n                        fours ? quantize_shared<4>", lambda n: 96 << 10),
    "token_drop_kernel": ("drop_bytes, token_drop_kernel", lambda: 1024 * 8 + 256 * 4 + 8 * 4 + 16),
    "token_gather_kernel": ("token_gather_kernel<4> : token_gather_kernel<1>", lambda n: 0),
    "token_assign_kernel": ("assign_bytes,\n                fours ? token_assign_kernel<4>",
                            lambda n: 2 * 64 * 9 * 16 + 64 * 4 + 16),
    "token_merge_kernel": ("row_threads, 0, by_fours(a.n, {&c.out, &c.in[0]}) ? token_merge_kernel<4>", lambda n: 0),
}

Budget = collections.namedtuple("Budget", "registers shared spills line")
Instance = collections.namedtuple("Instance", "kernel arguments architecture registers spills shared threads")


def read_kernels(text):
    """name -> Budget or None, of every kernel."""
    kernels = {}
    for m in re.finditer(r"^RS_KERNEL\(", text, re.M):
        depth, at = 1, m.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        name = re.match(r"\s*(\w+)\(", text[at:]).group(1)
        before = text[:m.start()].rstrip("\n").split("\n")
        if before[-1].startswith("template <"):
            before.pop()
        b = re.fullmatch(r"// budget: registers (\d+), shared (\d+), spills (\d+)", before[-1])
        kernels[name] = Budget(*map(int, b.groups()), len(before)) if b else None
    budgets = len(re.findall(r"^// budget:", text, re.M))
    if budgets != sum(b is not None for b in kernels.values()):
        raise SystemExit(f"{budgets} lines say 'budget', of which {sum(b is not None for b in kernels.values())} stand right above a kernel")
    return kernels


def find_nvcc():
    for path in (os.environ.get("CUDACXX"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            return path
    return None


def sections(elf):
    """(name, contents, header) of a 64-bit ELF file."""
    offset, = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    strings = headers[names][4]
    for h in headers:
        begin = strings + h[0]
        name = elf[begin:elf.index(b"\0", begin)].decode()
        yield name, b"" if h[1] == 8 else elf[h[4]:h[4] + h[5]]


def block_threads(cubin):
    """Threads of a block that kernels were compiled for, by their mangled names: attribute 5 of .nv.info.* (EIATTR_MAX_THREADS)."""
    threads = {}
    for name, data in sections(cubin):
        if not name.startswith(".nv.info."):
            continue
        at = 0
        while at + 4 <= len(data):
            form, attribute, value = struct.unpack_from("<BBH", data, at)
            at += 4
            if form == 4:  # a value of so many bytes
                if attribute == 5 and value >= 12:
                    x, y, z = struct.unpack_from("<III", data, at)
                    threads[name[len(".nv.info."):]] = x * y * z
                at += value
    return threads


def fatbin_entries(data):
    """What a library holds, as 'sm_80' or 'compute_90': by the headers of the fat binaries in it."""
    found, at = set(), 0
    while True:
        at = data.find(struct.pack("<I", 0xBA55ED50), at)
        if at < 0:
            return found
        _, header, size = struct.unpack_from("<HHQ", data, at + 4)
        entry, end = at + header, at + header + size
        while entry + 32 <= min(end, len(data)):
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, entry)
            architecture, = struct.unpack_from("<I", data, entry + 28)
            if kind not in (1, 2) or entry_header < 32:
                break
            found.add(f"{'compute' if kind == 1 else 'sm'}_{architecture}")
            entry += entry_header + entry_size
        at += 16


def compile_for(nvcc, flags, architecture, folder):
    """-> (report of ptxas, cubin)"""
    out = pathlib.Path(folder) / f"{architecture}.cubin"
    command = [nvcc, *flags, "-Xptxas", "-v", "-cubin", f"-arch=sm_{architecture}", "-o", str(out), str(SOURCE / "rs-cuda.cu")]
    r = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if r.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{r.stdout[-6000:]}")
    return r.stdout, out.read_bytes()


def demangle(names):
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if not tool:
        raise SystemExit("neither cu++filt nor c++filt is here")
    r = subprocess.run([tool], input="\n".join(names) + "\n", stdout=subprocess.PIPE, text=True, check=True)
    return r.stdout.splitlines()


def read_instances(report, cubin, architecture):
    threads = block_threads(cubin)
    found, mangled, spills = [], None, 0  # found: mangled name, registers, spills, static shared memory
    for line in report.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for", line):
            mangled, spills = m.group(1), 0
        elif m := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = max(int(m.group(1)), int(m.group(2)))
        elif mangled and (m := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found.append((mangled, int(m.group(1)), spills, int(shared.group(1)) if shared else 0))
            mangled = None
    result = []
    for plain, (name, registers, spilled, shared) in zip(demangle([f[0] for f in found]), found):
        # void (anonymous namespace)::kernel<true, (rs_type)1, 64>(..)
        plain = re.sub(r"\(anonymous namespace\)::", "", plain)
        plain = re.sub(r"\(\w+\)(?=\d)", "", plain)
        m = re.match(r"(?:void )?(?:\w+::)*(\w+)(?:<([^<>]*)>)?\(", plain)
        if not m:
            raise SystemExit(f"what kernel is {plain!r}?")
        values = []
        for argument in (m.group(2) or "").split(","):
            argument = argument.strip()
            if argument:
                values.append({"true": True, "false": False}.get(argument, int(argument) if argument.isdigit() else argument))
        result.append(Instance(m.group(1), tuple(values), architecture, registers, spilled, shared, threads.get(name, 1024)))
    return result


def blocks_of(i, dynamic):
    """Blocks that a multiprocessor holds."""
    machine = MACHINES[int(i.architecture.rstrip("a"))]
    warps = -(-i.threads // 32)
    per_warp = -(-i.registers * 32 // 256) * 256
    by_registers = REGISTERS // (per_warp * warps) if per_warp else machine.blocks
    return min(machine.blocks, machine.threads // (warps * 32), by_registers, machine.shared // (i.shared + dynamic + 1024))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default="80-real|86-real|89-real|90a-real|90-virtual", help="CMAKE_CUDA_ARCHITECTURES, with | between them")
    parser.add_argument("--flags", default="-std=c++17|-O3|-DNDEBUG|-fmad=false", help="of nvcc, with | between them")
    parser.add_argument("--library", help="a librs-cuda.so that must hold code for all architectures")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    text = (SOURCE / "rs-cuda.cu").read_text()
    kernels = read_kernels(text)
    wrong = [f"{name}: a hot kernel without a budget" for name in HOT if name in kernels and not kernels[name]]
    wrong += [f"{name}: in the list of hot kernels, but not in rs-cuda.cu" for name in HOT if name not in kernels]
    for name, (launch, _) in LAUNCHES.items():
        if launch not in text:
            wrong.append(f"{name}: rs-cuda.cu no longer has {launch!r}: see LAUNCHES")

    nvcc = find_nvcc()
    if not nvcc:
        for line in wrong:
            print(line)
        print("no nvcc: kernels are not compiled" + ("" if wrong else ", skipped"))
        return 1 if wrong else 77
    wanted = options.architectures.split("|")
    numbers = [re.match(r"\d+a?", a).group() for a in wanted if not a.endswith("-virtual")]
    # nvcc passes -Xcompiler on to a compiler that ptxas's numbers do not depend on.
    flags = [f for f in options.flags.split("|") if f]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rs-gate-") as folder, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        made = list(pool.map(lambda n: compile_for(nvcc, flags, n, folder), numbers))
    instances = [i for n, (report, cubin) in zip(numbers, made) for i in read_instances(report, cubin, n)]
    print(f"{len(instances)} kernels for {', '.join(f'sm_{n}' for n in numbers)} compiled in {time.monotonic() - begin:.0f} s\n")

    print(f"{'kernel':44} {'sm':>3} {'threads':>7} {'registers':>9} {'spills':>6} {'shared':>7} {'static':>6} {'blocks':>6}  budget")
    most = collections.defaultdict(lambda: [0, 0, 0])  # registers, shared, spills
    for i in sorted(instances, key=lambda i: (i.kernel not in HOT, i.kernel, str(i.arguments), i.architecture)):
        budget = kernels.get(i.kernel)
        dynamic = LAUNCHES[i.kernel][1](*i.arguments) if i.kernel in LAUNCHES else budget.shared if budget else 0
        here = [i.registers, dynamic, i.spills]
        most[i.kernel] = [max(a, b) for a, b in zip(most[i.kernel], here)]
        label = i.kernel + (f"<{', '.join(map(str, i.arguments)).lower()}>" if i.arguments else "")
        blocks = blocks_of(i, dynamic)
        said = f"{budget.registers} {budget.shared} {budget.spills}" if budget else ""
        print(f"{label:44} {i.architecture:3} {i.threads:7} {i.registers:9} {i.spills:6} {dynamic:7} {i.shared:6} {blocks:6}  {said}")
        if i.spills > (budget.spills if budget else 0):
            wrong.append(f"{label}, sm_{i.architecture}: spills {i.spills} bytes")
        if not blocks:
            wrong.append(f"{label}, sm_{i.architecture}: no multiprocessor holds a block of it")
        if budget and i.registers > budget.registers:
            wrong.append(f"{label}, sm_{i.architecture}: {i.registers} registers, {budget.registers} are its budget")
        if budget and dynamic > budget.shared:
            wrong.append(f"{label}: {dynamic} bytes of shared memory, {budget.shared} are its budget")
    print("\nlargest of each hot kernel")
    for name in HOT:
        budget, (registers, shared, spills) = kernels.get(name), most[name]
        print(f"  {name:24} registers {registers}, shared {shared}, spills {spills}"
              + (f"  (budget {budget.registers}, {budget.shared}, {budget.spills})" if budget else ""))
        if budget and registers and (budget.registers > registers + 16 or budget.shared != shared):
            wrong.append(f"{name}: its budget is not what it takes: registers {registers}, shared {shared}, spills {spills}")
    missing = [n for n in kernels if n not in most]
    if missing:
        wrong.append("no instance of " + ", ".join(missing))

    if options.library:
        held = fatbin_entries(pathlib.Path(options.library).read_bytes())
        print(f"\n{options.library} holds {', '.join(sorted(held))}")
        for a in wanted:
            n = re.match(r"\d+", a).group()
            for kind in ("sm",) if a.endswith("-real") else ("compute",) if a.endswith("-virtual") else ("sm", "compute"):
                if f"{kind}_{n}" not in held:
                    wrong.append(f"{options.library}: no {kind}_{n}")
    print()
    wrong = list(dict.fromkeys(wrong))
    for line in wrong:
        print(line)
    print(f"{len(wrong)} not as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
