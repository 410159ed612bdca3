# Sourced by the scripts beside it: makes .venv and installs into it, only where something has changed.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

# One slow answer of the package index should not end an installation that takes minutes.
export PIP_RETRIES="${PIP_RETRIES:-10}" PIP_DEFAULT_TIMEOUT="${PIP_DEFAULT_TIMEOUT:-60}"

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

fail() {
    printf 'castor: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed; install it so that python3 or python3.11 is on the PATH"
}

# The stamp of an installation lists everything it was made from; it is written last, so a broken one is redone.
fingerprint() { (cd "$root" && pwd && cat pyproject.toml constraints.txt) | cksum; }

# installed EXTRAS: whether the project was installed with these exact files (EXTRAS is "" or "[test]").
installed() { [[ -f "$venv/.installed$1" && "$(<"$venv/.installed$1")" == "$(fingerprint)" ]]; }

# install EXTRAS: install the project unless that was done.
install() {
    installed "$1" && return
    make_environment
    from_root install_torch
    from_root install_project "$1"
    # The test tools come with everything that serving needs.
    fingerprint | tee "$venv/.installed" >"$venv/.installed$1"
}

make_environment() {
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    local python
    python="$(find_python)"
    say "Making the environment $venv"
    "$python" -m venv --clear "$venv" || fail "$python cannot make an environment; on Debian install python3-venv"
}

# pip reads constraints and the project relative to the root: paths with spaces need no quoting there.
from_root() {
    (cd "$root" && "$@") || fail "the installation failed; the messages of pip above say why"
}

# torch comes first and alone, from its own index where one is named; the pin then keeps pip from replacing it.
install_torch() {
    say "Installing torch (this takes a while)"
    "$venv/bin/python" -m pip install --disable-pip-version-check \
        ${CASTOR_TORCH_INDEX:+--index-url "$CASTOR_TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
}

install_options_reader() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt typer pyyaml
}

install_project() {
    say "Installing Castor"
    "$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e ".$1"
}
