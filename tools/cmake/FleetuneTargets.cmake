# The few ways in which a target is made here. Each folder's CMakeLists.txt lists its sources, its
# tests, its fuzz targets and its benchmarks by name.

add_library(fl_flags INTERFACE)
target_include_directories(fl_flags INTERFACE ${PROJECT_SOURCE_DIR})
target_compile_options(fl_flags INTERFACE -Wall -Wextra -Werror -Wconversion -Wshadow -Wvla
    -Wstrict-prototypes -Wmissing-prototypes -Wundef -ffp-contract=off -fno-common
    -fstack-protector-strong)
target_compile_definitions(fl_flags INTERFACE _GNU_SOURCE FL_VERSION="${PROJECT_VERSION}")
if(FL_SANITIZE)
  target_compile_options(fl_flags INTERFACE
      -fsanitize=${FL_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all)
  target_link_options(fl_flags INTERFACE -fsanitize=${FL_SANITIZE})
elseif(CMAKE_BUILD_TYPE STREQUAL "Release" OR CMAKE_BUILD_TYPE STREQUAL "RelWithDebInfo")
  target_compile_options(fl_flags INTERFACE -D_FORTIFY_SOURCE=2)
endif()
if(FL_FAULTS)
  target_compile_definitions(fl_flags INTERFACE FL_FAULTS)
endif()
if(FL_FUZZ) # the libraries too: a fuzzer that cannot see their branches explores nothing
  target_compile_options(fl_flags INTERFACE -fsanitize=fuzzer-no-link)
endif()

# A third-party library, found by pkg-config; its headers give none of our warnings.
find_package(PkgConfig REQUIRED)
function(fl_third_party name)
  pkg_check_modules(${name} REQUIRED IMPORTED_TARGET ${ARGN})
  add_library(fl_${name} INTERFACE)
  target_link_libraries(fl_${name} INTERFACE PkgConfig::${name})
  get_target_property(dirs PkgConfig::${name} INTERFACE_INCLUDE_DIRECTORIES)
  if(dirs)
    target_include_directories(fl_${name} SYSTEM INTERFACE ${dirs})
  endif()
endfunction()

# What the tests run on: cmocka, or a plain loop where the target has none (tests/check.h).
add_library(fl_check INTERFACE)
if(CMAKE_CROSSCOMPILING)
  target_compile_definitions(fl_check INTERFACE FL_TESTS_PLAIN)
else()
  pkg_check_modules(cmocka REQUIRED IMPORTED_TARGET cmocka)
  target_link_libraries(fl_check INTERFACE PkgConfig::cmocka)
endif()

# fl_test(test_x lib...): builds tests/test_x.c and runs it with a time limit. Extra arguments:
# TIMEOUT seconds, LABELS names.
function(fl_test name)
  cmake_parse_arguments(t "" "TIMEOUT" "LABELS" ${ARGN})
  add_executable(${name} ${PROJECT_SOURCE_DIR}/tests/${name}.c)
  target_link_libraries(${name} PRIVATE ${t_UNPARSED_ARGUMENTS} fl_flags fl_check m)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${PROJECT_BINARY_DIR})
  if(NOT t_TIMEOUT)
    set(t_TIMEOUT 120)
  endif()
  if(CMAKE_CROSSCOMPILING) # an emulator is about ten times slower
    math(EXPR t_TIMEOUT "${t_TIMEOUT} * 3")
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${t_TIMEOUT} SKIP_RETURN_CODE 77)
  if(t_LABELS)
    set_tests_properties(${name} PROPERTIES LABELS "${t_LABELS}")
  endif()
endfunction()

# fl_fuzz(fuzz_x lib...): tests/fuzz/fuzz_x.c. Without libFuzzer the same target replays its corpus
# tests/fuzz/corpus/fuzz_x as a test.
function(fl_fuzz name)
  if(FL_FUZZ)
    add_executable(${name} ${PROJECT_SOURCE_DIR}/tests/fuzz/${name}.c)
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
  else()
    add_executable(${name} ${PROJECT_SOURCE_DIR}/tests/fuzz/${name}.c
                   ${PROJECT_SOURCE_DIR}/tests/fuzz/replay.c)
    add_test(NAME ${name}_replay
             COMMAND ${name} ${PROJECT_SOURCE_DIR}/tests/fuzz/corpus/${name})
    set_tests_properties(${name}_replay PROPERTIES TIMEOUT 120)
  endif()
  target_link_libraries(${name} PRIVATE ${ARGN} fl_flags m)
endfunction()

# fl_bench(bench_x lib...): bench/bench_x.c, smoked on every build.
function(fl_bench name)
  add_executable(${name} ${PROJECT_SOURCE_DIR}/bench/${name}.c)
  target_link_libraries(${name} PRIVATE ${ARGN} fl_flags m)
  add_test(NAME ${name}_smoke COMMAND ${name} --smoke)
  set_tests_properties(${name}_smoke PROPERTIES TIMEOUT 120)
endfunction()
