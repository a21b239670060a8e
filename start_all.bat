@echo off
rem Starts the demo: three backends and the load balancer. See start_all.bat --help
rem This only finds a Python and calls it; start_all.py does the work, the same on every system.
setlocal EnableExtensions DisableDelayedExpansion
cd /d "%~dp0"
set "FOUND=none"
set "PYTHON_COMMAND="

call :try py -3
if not defined PYTHON_COMMAND call :try python3
if not defined PYTHON_COMMAND call :try python
if defined PYTHON_COMMAND goto run
echo start_all: error: Python 3.11 or newer is needed, found: %FOUND%; install it from python.org or your system's packages>&2
exit /b 2

rem "call" below, because pyenv and others put a python.bat in the path, and a batch file does not return without it.
:try
for /f "delims=" %%v in ('%* -c "import platform; print(platform.python_version())" 2^>nul') do set "FOUND=%%v (%*)"
call %* -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul
if "%ERRORLEVEL%"=="0" set "PYTHON_COMMAND=%*"
exit /b 0

:run
%PYTHON_COMMAND% "%~dp0start_all.py" %*
exit /b %ERRORLEVEL%
