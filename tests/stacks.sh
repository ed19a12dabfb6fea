#!/usr/bin/env bash
# Software GPU drivers for the tests: installs them and runs commands on exactly one of them.
set -euo pipefail

usage() {
  cat <<'EOF'
tests/stacks.sh install            install every stack (Debian 12 and later, Ubuntu 24.04 and later; root or sudo)
tests/stacks.sh run STACK CMD...   run CMD with only that stack's adapter visible
tests/stacks.sh list               the stacks and whether they are installed

STACK  lavapipe     Mesa's Vulkan on the CPU: f16, subgroups of 8, 8x8x8 cooperative matrices
       swiftshader  Chromium's Vulkan on the CPU: subgroups of 4, no f16
       gl           Mesa's OpenGL ES on the CPU (llvmpipe): neither f16 nor subgroups
       cpu          no adapter at all
       native       the machine as it is

The drivers go into $LIGHTHOUSE_STACKS, by default target/stacks. CMD sees LIGHTHOUSE_BACKEND (vulkan, gl or cpu).
EOF
}

say() { printf 'stacks: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 1
}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
stacks=${LIGHTHOUSE_STACKS:-$repo/target/stacks}
[[ $stacks == /* ]] || stacks=$PWD/$stacks

# The lavapipe of Mesa 26 has cooperative matrices, that of 25 (Debian 13, Ubuntu 24.04) everything else.
mesa_wanted=26
mesa_least=25
# The Debian release whose backports have the wanted Mesa, for releases whose own is older.
debian_suite=trixie

egl_mesa=/usr/share/glvnd/egl_vendor.d/50_mesa.json

machine=$(uname -m)
triple=$machine-linux-gnu
case $machine in
x86_64) loader_name=usr/lib64/ld-linux-x86-64.so.2 ;;
aarch64) loader_name=usr/lib/ld-linux-aarch64.so.1 ;;
*) loader_name= ;;
esac

# ---------------------------------------------------------------------------------------------------------- packages

as_root() {
  if [[ $EUID == 0 ]]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "needs root: run as root, install sudo, or run: $*"
  fi
}

updated=
apt_update() {
  [[ -z $updated ]] || return 0
  say "reading the package lists"
  as_root apt-get update -qq >&2 || die "apt-get update failed"
  updated=yes
}

# Installs the packages that are missing.
apt_install() {
  local package missing=()
  for package; do
    [[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == *" installed" ]] || missing+=("$package")
  done
  [[ ${#missing[@]} != 0 ]] || return 0
  apt_update
  say "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2 ||
    die "could not install ${missing[*]}"
}

# The major version of Mesa that the distribution's own mesa-vulkan-drivers has; 0 if there is none.
own_mesa() {
  local version
  version=$(apt-cache policy mesa-vulkan-drivers 2>/dev/null | sed -n 's/^ *Candidate: \([0-9]\{1,\}\)\..*/\1/p')
  echo "${version:-0}"
}

# Fails if a library, or one that it needs, cannot be loaded: check_library LIBRARY LISTER...
check_library() {
  local library=$1 out
  shift
  out=$("$@" "$library" 2>&1) || die "$library cannot be loaded: $out"
  [[ $out != *"not found"* ]] || die "$library lacks libraries: $(grep 'not found' <<<"$out")"
}

# ------------------------------------------------------------------------------------------------------------ stacks
# A stack is a folder with `stamp` (written last: what was installed and where) and, for Vulkan, `icd.json`.

installed() {
  local dir=$stacks/$1 library
  [[ -f $dir/stamp && $(sed -n 2p "$dir/stamp") == "$dir" ]] || return 1
  if [[ $1 == gl ]]; then
    library=$egl_mesa
  else
    library=$(sed -n 's/.*"library_path": "\([^"]*\)".*/\1/p' "$dir/icd.json")
  fi
  [[ -f $library ]]
}

stamp() { printf '%s\n%s\n' "$2" "$stacks/$1" >"$stacks/$1/stamp"; }

# icd.json for a driver library: write_icd STACK LIBRARY API_VERSION
write_icd() {
  cat >"$stacks/$1/icd.json" <<EOF
{
  "file_format_version": "1.0.1",
  "ICD": { "library_path": "$2", "api_version": "$3" }
}
EOF
}

install_lavapipe() {
  apt_update
  local own
  own=$(own_mesa)
  if [[ $ID == debian ]] && ((own < mesa_wanted)); then
    install_lavapipe_root
  elif ((own >= mesa_least)); then
    apt_install mesa-vulkan-drivers
    local library=/usr/lib/$triple/libvulkan_lvp.so
    check_library "$library" ldd
    write_icd lavapipe "$library" 1.4.0
    local note=
    ((own >= mesa_wanted)) || note=" (no cooperative matrices before Mesa $mesa_wanted: nothing tests them here)"
    stamp lavapipe "Mesa $(dpkg-query -W -f '${Version}' mesa-vulkan-drivers), the distribution's own$note"
  else
    die "lavapipe: $PRETTY_NAME has Mesa $own, and the tests need $mesa_least or later"
  fi
}

# Mesa of a later Debian release in a folder of its own with its own C library, nothing of it on the system.
install_lavapipe_root() {
  [[ -n $loader_name ]] || die "lavapipe: no recipe for $machine"
  local dir=$stacks/lavapipe/apt root=$stacks/lavapipe/root mirror keyring
  # The mirror that the system's own sources name for this release, in whichever file and format.
  # shellcheck disable=SC2016 # apt fills these in
  mirror=$(apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Created-By: Packages' |
    awk -v release="$VERSION_CODENAME" '$1 == release && $2 == "main" { print $3; exit }')
  [[ -n $mirror ]] || die "lavapipe: apt's sources name no mirror of $VERSION_CODENAME main"
  for keyring in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
    [[ ! -f $keyring ]] || break
  done
  [[ -f $keyring ]] || die "lavapipe: no $keyring; install debian-archive-keyring"

  mkdir -p "$dir"/{lists,cache/archives}/partial "$dir"/{parts,log} "$root"
  : >"$dir/status"
  printf "deb [signed-by=$keyring] $mirror %s main\n" "$debian_suite" "$debian_suite-backports" >"$dir/sources.list"
  local apt=(apt-get -qq
    -o "Dir::State=$dir" -o "Dir::State::lists=$dir/lists" -o "Dir::State::status=$dir/status"
    -o "Dir::Cache=$dir/cache" -o "Dir::Cache::archives=$dir/cache/archives" -o "Dir::Log=$dir/log"
    -o "Dir::Etc::sourcelist=$dir/sources.list" -o "Dir::Etc::sourceparts=$dir/parts"
    -o "Dir::Etc::preferences=$dir/none" -o "Dir::Etc::preferencesparts=$dir/parts" -o "APT::Sandbox::User=")

  say "downloading Mesa from $debian_suite-backports"
  "${apt[@]}" update >&2 || die "lavapipe: the mirror has no usable $debian_suite-backports"
  "${apt[@]}" install -y --download-only --no-install-recommends -t "$debian_suite-backports" \
    mesa-vulkan-drivers libvulkan1 >&2 || die "lavapipe: could not download Mesa"
  local deb version
  for deb in "$dir"/cache/archives/*.deb; do
    dpkg-deb -x "$deb" "$root"
  done
  version=$(dpkg-deb -f "$dir"/cache/archives/mesa-vulkan-drivers_*.deb Version)
  ((${version%%.*} >= mesa_wanted)) || die "lavapipe: the mirror has only Mesa $version"
  rm -rf "$dir"
  check_library "$root/usr/lib/$triple/libvulkan_lvp.so" \
    "$root/$loader_name" --library-path "$root/usr/lib/$triple" --list
  write_icd lavapipe "$root/usr/lib/$triple/libvulkan_lvp.so" 1.4.0
  stamp lavapipe "Mesa $version, with its own loader"
}

# Only the driver of Debian's Chromium, or of the npm package @sparticuz/chromium where Chromium comes as a snap.
install_swiftshader() {
  apt_update
  local dir=$stacks/swiftshader version
  mkdir -p "$dir/download"
  if [[ $ID == debian ]]; then
    say "downloading chromium-common for its SwiftShader"
    (cd "$dir/download" && apt-get download -qq -o APT::Sandbox::User= chromium-common >&2) ||
      die "swiftshader: could not download chromium-common"
    version="of chromium-common $(dpkg-deb -f "$dir"/download/*.deb Version)"
    dpkg-deb --fsys-tarfile "$dir"/download/*.deb |
      tar -x -C "$dir" --wildcards --transform 's,.*/,,' '*/libvk_swiftshader.so' ||
      die "swiftshader: the chromium-common package has no libvk_swiftshader.so"
  else
    [[ $machine == x86_64 ]] || die "swiftshader: no package with it for $machine on $PRETTY_NAME"
    command -v npm >/dev/null || apt_install npm
    apt_install brotli
    say "downloading @sparticuz/chromium for its SwiftShader"
    (cd "$dir/download" && npm pack --loglevel=error @sparticuz/chromium >/dev/null) ||
      die "swiftshader: could not download the npm package @sparticuz/chromium"
    version="of $(basename "$dir"/download/*.tgz .tgz)"
    tar -xzOf "$dir"/download/*.tgz package/bin/swiftshader.tar.br | brotli -dc |
      tar -x -C "$dir" libvk_swiftshader.so ||
      die "swiftshader: the npm package has no libvk_swiftshader.so"
  fi
  rm -rf "$dir/download"
  check_library "$dir/libvk_swiftshader.so" ldd
  write_icd swiftshader "$dir/libvk_swiftshader.so" 1.1.0
  stamp swiftshader "SwiftShader $version"
}

install_gl() {
  [[ -f $egl_mesa ]] || die "gl: Mesa's EGL came without $egl_mesa"
  stamp gl "Mesa $(dpkg-query -W -f '${Version}' libegl-mesa0), the distribution's own"
}

install_all() {
  local stack
  ID='' ID_LIKE='' VERSION_CODENAME='' PRETTY_NAME=$(uname -s)
  # shellcheck disable=SC1091 # the machine's own
  [[ ! -f /etc/os-release ]] || . /etc/os-release
  if [[ " $ID $ID_LIKE " != *" debian "* ]] || ! command -v apt-get >/dev/null; then
    die "$PRETTY_NAME is neither Debian nor Ubuntu. Install Mesa $mesa_wanted or later with lavapipe (Vulkan) and" \
      "llvmpipe (EGL, OpenGL ES) and the Vulkan loader with the system's packages, then run the tests as" \
      "'tests/stacks.sh run native cargo test'."
  fi
  [[ $stacks != *[[:space:]\"\\]* ]] ||
    die "cargo cannot start tests from '$stacks': set LIGHTHOUSE_STACKS to a path without spaces"
  command -v cc >/dev/null || apt_install gcc libc6-dev # cargo's linker
  # The loaders of Vulkan and OpenGL, which wgpu opens, and Mesa's OpenGL ES.
  apt_install libvulkan1 libegl1 libegl-mesa0 libgl1-mesa-dri libgles2
  for stack in lavapipe swiftshader gl; do
    if ! installed "$stack"; then
      rm -rf "${stacks:?}/$stack"
      mkdir -p "$stacks/$stack"
      "install_$stack"
    fi
    say "$stack: $(head -n 1 "$stacks/$stack/stamp")"
  done
}

list_all() {
  local stack
  for stack in lavapipe swiftshader gl; do
    if installed "$stack"; then
      printf '%-12s %s\n' "$stack" "$(head -n 1 "$stacks/$stack/stamp")"
    else
      printf '%-12s %s\n' "$stack" "not installed: tests/stacks.sh install"
    fi
  done
  printf '%-12s %s\n' cpu "no adapter" native "the machine as it is"
}

# --------------------------------------------------------------------------------------------------------------- run

# Hides every driver but the named ones: only BACKEND VULKAN_ICD EGL_VENDOR
only() {
  export LIGHTHOUSE_BACKEND=$1 VK_DRIVER_FILES=$2 VK_ICD_FILENAMES=$2 __EGL_VENDOR_LIBRARY_FILENAMES=$3
  export VK_LOADER_LAYERS_DISABLE='~implicit~'
  unset VK_ADD_DRIVER_FILES VK_LOADER_DRIVERS_SELECT VK_LOADER_DRIVERS_DISABLE WGPU_BACKEND WGPU_ADAPTER_NAME
}

# A program that was built here, as opposed to one of the machine's own such as cargo or bash.
built_here() {
  [[ $1 == */* && $1 != /usr/* && $1 != /bin/* && ${1##*/} != cargo ]] && [[ $(head -c 4 "$1") == $'\x7fELF' ]]
}

run_on() {
  local stack=$1 none=$stacks/no-driver.json
  shift
  case $stack in
  lavapipe | swiftshader | gl) installed "$stack" || die "$stack is not installed: run tests/stacks.sh install" ;;
  esac
  case $stack in
  lavapipe)
    only vulkan "$stacks/lavapipe/icd.json" "$none"
    local root=$stacks/lavapipe/root
    if [[ -d $root ]]; then
      # The driver needs its own C library, so the tests are started through that library's loader.
      local loader=("$root/$loader_name" --library-path "$root/usr/lib/$triple")
      export "CARGO_TARGET_${machine^^}_UNKNOWN_LINUX_GNU_RUNNER=${loader[*]}"
      if built_here "$1"; then
        set -- "${loader[@]}" "$@"
      fi
    fi
    ;;
  swiftshader) only vulkan "$stacks/swiftshader/icd.json" "$none" ;;
  gl)
    only gl "$none" "$egl_mesa"
    export EGL_PLATFORM=surfaceless LIBGL_ALWAYS_SOFTWARE=1 GALLIUM_DRIVER=llvmpipe
    # wgpu's OpenGL device has one context, and panics when a thread waits for it for over 6 s: a slow test's wait is that.
    export RUST_TEST_THREADS=1
    ;;
  cpu) only cpu "$none" "$none" ;;
  native) ;;
  *) die "no stack '$stack': one of lavapipe, swiftshader, gl, cpu, native" ;;
  esac
  exec "$@"
}

case ${1-} in
install) install_all ;;
list) list_all ;;
run)
  (($# >= 3)) || { usage >&2 && exit 2; }
  run_on "${@:2}"
  ;;
-h | --help | help) usage ;;
*) usage >&2 && exit 2 ;;
esac
