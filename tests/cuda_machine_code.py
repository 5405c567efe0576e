"""What nvcc makes of a file of kernels for sm_90: read from the cubin itself, so that nothing but nvcc is needed."""

import re
import struct
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURE = "90"

# The low 12 bits of an instruction, which has 16 bytes, as cuobjdump -sass names them.
_NOP, _ACCESSES = 0x918, {0x986: "store", 0x981: "load"}
_BYTES = (1, 1, 2, 2, 4, 8, 16)  # of an access, by bits 73 to 75


@dataclass
class Kernel:
    """instructions: without padding. stores, loads: of global memory, how many instructions of each number of bytes."""

    registers: int
    instructions: int
    stores: Counter[int]
    loads: Counter[int]


def compile_kernels(nvcc: str, source: Path, folder: Path) -> tuple[Path, dict[str, Kernel]]:
    """Its object, compiled with the flags of the build and every warning an error, and its kernels by their mangled names."""
    target = folder / f"{source.stem}.o"
    command = [nvcc, "-std=c++20", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += [f"-gencode=arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}", f'-DODENET_ARCHITECTURES="{ARCHITECTURE}"']
    command += ["-Werror=all-warnings", "-Xptxas=-v", "-keep", f"-keep-dir={folder}", "-c", str(source), "-o", str(target)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    words = compiled.stdout + compiled.stderr
    assert compiled.returncode == 0 and "warning" not in words, words[-4000:]
    of_each = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", words, re.DOTALL)
    texts = _texts((folder / f"{source.stem}.cubin").read_bytes())
    return target, {name: _kernel(texts[name], int(registers)) for name, registers in of_each}


def _texts(cubin: bytes) -> dict[str, bytes]:
    """The code of each kernel. https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.sheader.html"""
    assert cubin[:5] == b"\x7fELF\x02"  # of 64 bits
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]  # name .. offset, size
    texts = {}
    for name_at, _, _, _, offset, length in headers:
        start = headers[names][4] + name_at
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".text."):
            texts[name.removeprefix(".text.")] = cubin[offset : offset + length]
    return texts


def _kernel(text: bytes, registers: int) -> Kernel:
    kernel = Kernel(registers, 0, Counter(), Counter())
    for low, high in struct.iter_unpack("<QQ", text):
        kernel.instructions += low & 0xFFF != _NOP
        access = _ACCESSES.get(low & 0xFFF)
        if access:
            (kernel.stores if access == "store" else kernel.loads)[_BYTES[high >> 9 & 7]] += 1
    return kernel
